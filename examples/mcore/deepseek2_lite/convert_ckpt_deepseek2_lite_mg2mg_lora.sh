#!/usr/bin/env bash
# Merges a LoRA adapter into DeepSeek-V2-Lite-16B: a Megatron checkpoint of any TP x PP x EP.
#
#   CKPT_LOAD_DIR=./model_weights/deepseek2_lite_mcore/ LORA_LOAD=./ckpt/deepseek2_lite_lora \
#   CKPT_SAVE_DIR=./model_weights/deepseek2_lite_lora2mcore \
#       examples/mcore/deepseek2_lite/convert_ckpt_deepseek2_lite_mg2mg_lora.sh [more flags]
#
# Flags, their variables and values: ../tables/convert.sh; what is said here and in convert.sh comes before; the
# rules: ../job.sh.

# shellcheck source=../tables/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/convert.sh"

own TP 1
own PP 1
own EP 8

# shellcheck source=convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/convert.sh"

convert_mg2mg_lora "$@"
