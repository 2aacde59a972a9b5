#!/usr/bin/env bash
# Generates text with Yi-34B; LORA_LOAD adds an adapter, TASK is greedy, do_sample or chat.
#
#   CKPT_LOAD_DIR=./model_weights/Yi-mcore/ LORA_LOAD=./ckpt/yi_lora \
#   TOKENIZER_PATH=./model_from_hf/Yi-hf/ TASK=greedy \
#       examples/mcore/yi/generate_yi_34b_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/generate.sh; what is said here and in model.sh
# comes before; the rules: ../job.sh.

# shellcheck source=../tables/generate.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/generate.sh"

own TP 8
own SP 0

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

generate 6001 "$@"
