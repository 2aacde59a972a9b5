#!/usr/bin/env bash
# Turns a Megatron checkpoint of DeepSeek-V2-Lite-16B, of any layout, into a Hugging Face folder,
# <CKPT_SAVE_DIR>/mg2hf.
#
#   CKPT_LOAD_DIR=./model_weights/deepseek2_lite_mcore/ CKPT_SAVE_DIR=./model_from_hf/deepseek2_lite_hf/ \
#       examples/mcore/deepseek2_lite/convert_ckpt_deepseek2_lite_mcore2hf.sh [more flags]
#
# Flags, their variables and values: ../tables/convert.sh; what is said here and in convert.sh comes before; the
# rules: ../job.sh.

# shellcheck source=../tables/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/convert.sh"

# shellcheck source=convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/convert.sh"

convert_mcore2hf "$@"
