#!/usr/bin/env bash
# Merges a LoRA adapter into DeepSeek-V3: a Megatron checkpoint of any TP x PP x EP.
#
#   CKPT_LOAD_DIR=./model_weights/deepseek3-mcore/ LORA_LOAD=./ckpt/deepseek3_lora \
#   CKPT_SAVE_DIR=./model_weights/deepseek3_lora2mcore \
#       examples/mcore/deepseek3/ckpt_convert_deepseek3_mg2mg_lora.sh [more flags]
#
# Flags, their variables and values: ../tables/convert.sh; what is said here and in convert.sh comes before; the
# rules: ../job.sh.

# shellcheck source=../tables/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/convert.sh"

own TP 1
own PP 4
own EP 16
own NUM_LAYER_LIST 15,15,16,15

# shellcheck source=convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/convert.sh"

convert_mg2mg_lora "$@"
