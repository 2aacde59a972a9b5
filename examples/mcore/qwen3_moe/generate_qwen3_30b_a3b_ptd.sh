#!/usr/bin/env bash
# Generates text with Qwen3-30B-A3B; LORA_LOAD adds an adapter, TASK is greedy, do_sample or chat.
#
#   CKPT_LOAD_DIR=./model_weights/qwen3_moe_mcore/ LORA_LOAD=./ckpt/qwen3_moe_lora \
#   TOKENIZER_PATH=./model_from_hf/qwen3_moe_hf/ TASK=chat \
#       examples/mcore/qwen3_moe/generate_qwen3_30b_a3b_ptd.sh [more flags]
#
# Flags, their variables and values: ../model_experts.sh, ../generate_experts.sh; the rules: ../job.sh.

# shellcheck source=../generate_experts.sh
source "$(dirname "${BASH_SOURCE[0]}")/../generate_experts.sh"
# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

own TP 4
own PP 1
own EP 1

generate 6014 "$@"
