#!/usr/bin/env bash
# Generates text with Mixtral-8x7B; LORA_LOAD adds an adapter, TASK is greedy, do_sample or chat.
#
#   CKPT_LOAD_DIR=./model_weights/Mixtral-mcore/ LORA_LOAD=./ckpt/mixtral-lora \
#   TOKENIZER_PATH=./model_from_hf/Mixtral-8x7B/ TASK=greedy \
#       examples/mcore/mixtral/generate_mixtral_8x7b_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/generate.sh; what is said here and in model.sh
# comes before; the rules: ../job.sh.

# shellcheck source=../tables/generate.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/generate.sh"

own NPROC "${NPUS_PER_NODE:-8}"
own PP 4

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

generate 6001 "$@"
