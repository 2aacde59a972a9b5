#!/usr/bin/env bash
# Merges a LoRA adapter into Qwen1.5-32B: a Megatron checkpoint of any TP x PP.
#
#   CKPT_LOAD_DIR=./model_weights/qwen15_mcore/ LORA_LOAD=./ckpt/qwen15_lora \
#   CKPT_SAVE_DIR=./model_weights/qwen15_lora2mcore \
#       examples/mcore/qwen15/ckpt_convert_qwen15_mg2mg_lora.sh [more flags]
#
# Flags, their variables and values: ../tables/convert.sh; what is said here and in convert.sh comes before; the
# rules: ../job.sh.

# shellcheck source=../tables/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/convert.sh"

own TP 8
own PP 8

# shellcheck source=convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/convert.sh"

convert_mg2mg_lora "$@"
