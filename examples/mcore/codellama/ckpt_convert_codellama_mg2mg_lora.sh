#!/usr/bin/env bash
# Merges a LoRA adapter into CodeLlama-34B: a Megatron checkpoint of any TP x PP.
#
#   CKPT_LOAD_DIR=./model_weights/Codellama-mcore/ LORA_LOAD=./ckpt/codellama_lora \
#   CKPT_SAVE_DIR=./model_weights/codellama_lora2mcore \
#       examples/mcore/codellama/ckpt_convert_codellama_mg2mg_lora.sh [more flags]
#
# Flags, their variables and values: ../tables/convert.sh; what is said here and in convert.sh comes before; the
# rules: ../job.sh.

# shellcheck source=../tables/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/convert.sh"

own TP 8
own PP 2

# shellcheck source=convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/convert.sh"

convert_mg2mg_lora "$@"
