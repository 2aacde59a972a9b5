#!/usr/bin/env bash
# Merges a LoRA adapter into Llama-3.2-1B: a Megatron checkpoint of any TP x PP.
#
#   CKPT_LOAD_DIR=./model_weights/llama32-mcore/ LORA_LOAD=./ckpt/llama32_lora \
#   CKPT_SAVE_DIR=./model_weights/llama32_lora2mcore \
#       examples/mcore/llama32/ckpt_convert_llama32_mg2mg_lora.sh [more flags]
#
# Flags, their variables and values: ../tables/convert.sh; what is said here and in convert.sh comes before; the
# rules: ../job.sh.

# shellcheck source=../tables/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/convert.sh"

own TP 1
own PP 1

# shellcheck source=convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/convert.sh"

convert_mg2mg_lora "$@"
