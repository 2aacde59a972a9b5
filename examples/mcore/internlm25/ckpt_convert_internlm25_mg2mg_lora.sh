#!/usr/bin/env bash
# Merges a LoRA adapter into InternLM2.5-7B: a Megatron checkpoint of any TP x PP.
#
#   CKPT_LOAD_DIR=./model_weights/internlm25-7b-mcore-tp8-pp1/ LORA_LOAD=./ckpt/internlm25_lora \
#   CKPT_SAVE_DIR=./model_weights/internlm25_lora2mcore \
#       examples/mcore/internlm25/ckpt_convert_internlm25_mg2mg_lora.sh [more flags]
#
# Flags, their variables and values: ../tables/convert.sh; what is said here and in convert.sh comes before; the
# rules: ../job.sh.

# shellcheck source=../tables/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/convert.sh"

own TP 8
own PP 1

# shellcheck source=convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/convert.sh"

convert_mg2mg_lora "$@"
