#!/usr/bin/env bash
# Turns a Megatron checkpoint of Qwen2-7B, of any layout, into a Hugging Face folder, <CKPT_SAVE_DIR>/mg2hf.
#
#   CKPT_LOAD_DIR=./model_weights/qwen2_mcore/ CKPT_SAVE_DIR=./model_from_hf/qwen2_hf/ \
#       examples/mcore/qwen2/ckpt_convert_qwen2_mcore2hf.sh [more flags]
#
# Flags, their variables and values: ../tables/convert.sh; what is said here and in convert.sh comes before; the
# rules: ../job.sh.

# shellcheck source=../tables/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/convert.sh"

# shellcheck source=convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/convert.sh"

convert_mcore2hf "$@"
