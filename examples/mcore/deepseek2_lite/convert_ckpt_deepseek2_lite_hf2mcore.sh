#!/usr/bin/env bash
# Turns a Hugging Face folder of DeepSeek-V2-Lite-16B into a Megatron checkpoint of TP x PP x EP shards.
#
#   HF_MODEL_PATH=./model_from_hf/deepseek2_lite_hf/ TP=1 PP=1 EP=8 \
#   CKPT_SAVE_DIR=./model_weights/deepseek2_lite_mcore/ \
#       examples/mcore/deepseek2_lite/convert_ckpt_deepseek2_lite_hf2mcore.sh [more flags]
#
# Flags, their variables and values: ../tables/convert.sh; what is said here and in convert.sh comes before; the
# rules: ../job.sh.

# shellcheck source=../tables/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/convert.sh"

own TP 1
own PP 1
own EP 8

# shellcheck source=convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/convert.sh"

convert_hf2mcore "$@"
