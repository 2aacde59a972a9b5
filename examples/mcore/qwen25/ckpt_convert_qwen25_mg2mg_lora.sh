#!/usr/bin/env bash
# Merges a LoRA adapter into Qwen2.5-7B: a Megatron checkpoint of any TP x PP.
#
#   CKPT_LOAD_DIR=./model_weights/qwen2.5_mcore/ LORA_LOAD=./ckpt/qwen25_lora \
#   CKPT_SAVE_DIR=./model_weights/qwen25_lora2mcore \
#       examples/mcore/qwen25/ckpt_convert_qwen25_mg2mg_lora.sh [more flags]
#
# Flags, their variables and values: ../tables/convert.sh; what is said here and in convert.sh comes before; the
# rules: ../job.sh.

# shellcheck source=../tables/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/convert.sh"

own TP 4
own PP 2

# shellcheck source=convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/convert.sh"

convert_mg2mg_lora "$@"
