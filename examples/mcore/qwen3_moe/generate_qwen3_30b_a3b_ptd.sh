#!/usr/bin/env bash
# Generates text with Qwen3-30B-A3B; LORA_LOAD adds an adapter, TASK is greedy, do_sample or chat.
#
#   CKPT_LOAD_DIR=./model_weights/qwen3_moe_mcore/ LORA_LOAD=./ckpt/qwen3_moe_lora \
#   TOKENIZER_PATH=./model_from_hf/qwen3_moe_hf/ TASK=greedy \
#       examples/mcore/qwen3_moe/generate_qwen3_30b_a3b_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/generate.sh; what is said here and in model.sh
# comes before; the rules: ../job.sh.

# shellcheck source=../tables/generate.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/generate.sh"

own NPROC "${NPUS_PER_NODE:-8}"
own TP 4

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

generate 6014 "$@"
