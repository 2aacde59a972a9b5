#!/usr/bin/env bash
# Generates text with Qwen2-7B; LORA_LOAD adds an adapter, TASK is greedy, do_sample or chat.
#
#   CKPT_LOAD_DIR=./model_weights/qwen2_mcore/ LORA_LOAD=./ckpt/qwen2_lora \
#   TOKENIZER_PATH=./model_from_hf/qwen2_hf/ TASK=greedy \
#       examples/mcore/qwen2/generate_qwen2_7b_lora_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/generate.sh; what is said here and in model.sh
# comes before; the rules: ../job.sh.

# shellcheck source=../tables/generate.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/generate.sh"

own NPROC "${NPUS_PER_NODE:-8}"
own PP 8
own NUM_LAYER_LIST 4,4,4,4,3,3,3,3

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

generate 6000 "$@"
