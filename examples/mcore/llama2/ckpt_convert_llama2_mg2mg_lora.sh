#!/usr/bin/env bash
# Merges a LoRA adapter into Llama-2-7B: a Megatron checkpoint of any TP x PP.
#
#   CKPT_LOAD_DIR=./model_weights/Llama2-mcore/ LORA_LOAD=./ckpt/llama-2-7b-lora \
#   CKPT_SAVE_DIR=./model_weights/llama2-7b-lora2mcore \
#       examples/mcore/llama2/ckpt_convert_llama2_mg2mg_lora.sh [more flags]
#
# Flags, their variables and values: ../tables/convert.sh; what is said here and in convert.sh comes before; the
# rules: ../job.sh.

# shellcheck source=../tables/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/convert.sh"

own TP 1
own PP 1
own TOKENIZER_MODEL ""
own CKPT_LOAD_DIR ./model_weights/Llama2-mcore
own LORA_LOAD ./ckpt/llama-7b-lora-mcore-tp1pp1

# shellcheck source=convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/convert.sh"

convert_mg2mg_lora "$@"
