#!/usr/bin/env bash
# Merges a LoRA adapter into Qwen3-30B-A3B: a Megatron checkpoint of any TP x PP x EP.
#
#   CKPT_LOAD_DIR=./model_weights/qwen3_moe_mcore/ LORA_LOAD=./ckpt/qwen3_moe_lora \
#   CKPT_SAVE_DIR=./model_weights/qwen3_moe_lora2mcore \
#       examples/mcore/qwen3_moe/ckpt_convert_qwen3_moe_mg2mg_lora.sh [more flags]
#
# Flags, their variables and values: ../tables/convert.sh; what is said here and in convert.sh comes before; the
# rules: ../job.sh.

# shellcheck source=../tables/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/convert.sh"

own TP 4
own PP 1
own EP 1

# shellcheck source=convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/convert.sh"

convert_mg2mg_lora "$@"
