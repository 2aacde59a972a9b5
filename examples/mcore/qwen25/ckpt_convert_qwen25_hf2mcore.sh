#!/usr/bin/env bash
# Turns a Hugging Face folder of Qwen2.5-7B into a Megatron checkpoint of TP x PP shards.
#
#   HF_MODEL_PATH=./model_from_hf/qwen2.5_7b_hf/ TP=4 PP=2 \
#   CKPT_SAVE_DIR=./model_weights/qwen2.5_mcore/ \
#       examples/mcore/qwen25/ckpt_convert_qwen25_hf2mcore.sh [more flags]
#
# Flags, their variables and values: ../tables/convert.sh; what is said here and in convert.sh comes before; the
# rules: ../job.sh.

# shellcheck source=../tables/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/convert.sh"

own TP 4
own PP 2

# shellcheck source=convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/convert.sh"

convert_hf2mcore "$@"
