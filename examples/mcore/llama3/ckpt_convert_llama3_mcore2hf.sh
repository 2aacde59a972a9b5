#!/usr/bin/env bash
# Turns a Megatron checkpoint of Llama-3-8B, of any layout, into a Hugging Face folder, <CKPT_SAVE_DIR>/mg2hf.
#
#   CKPT_LOAD_DIR=./model_weights/llama3_mcore/ CKPT_SAVE_DIR=./model_from_hf/llama3_hf/ \
#       examples/mcore/llama3/ckpt_convert_llama3_mcore2hf.sh [more flags]
#
# Flags, their variables and values: ../tables/convert.sh; what is said here and in convert.sh comes before; the
# rules: ../job.sh.

# shellcheck source=../tables/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/convert.sh"

# shellcheck source=convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/convert.sh"

convert_mcore2hf "$@"
