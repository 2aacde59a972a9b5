#!/usr/bin/env bash
# Writes the LoRA adapter of a run of Llama-2-7B as a PEFT folder, <CKPT_SAVE_DIR>/mg2hf. (The run's own
# <save>/adapter is the same.)
#
#   CKPT_LOAD_DIR=./ckpt/llama-2-7b-lora CKPT_SAVE_DIR=./model_from_hf/llama-2-7b-hf/ \
#       examples/mcore/llama2/ckpt_convert_llama2_lora2hf.sh [more flags]
#
# Flags, their variables and values: ../tables/convert.sh; what is said here and in convert.sh comes before; the
# rules: ../job.sh.

# shellcheck source=../tables/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/convert.sh"

own CKPT_LOAD_DIR ./ckpt/llama2_lora_filter
own MODEL_TYPE_HF ""
own HF_TP 1
own HF_PP 1

# shellcheck source=convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/convert.sh"

convert_lora2hf "$@"
