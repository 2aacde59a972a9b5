#!/usr/bin/env bash
# Turns a Hugging Face folder of Qwen1.5-32B into a Megatron checkpoint of TP x PP shards.
#
#   HF_MODEL_PATH=./model_from_hf/qwen15_hf/ TP=8 PP=8 \
#   CKPT_SAVE_DIR=./model_weights/qwen15_mcore/ \
#       examples/mcore/qwen15/ckpt_convert_qwen15_hf2mcore.sh [more flags]
#
# Flags, their variables and values: ../tables/convert.sh; what is said here and in convert.sh comes before; the
# rules: ../job.sh.

# shellcheck source=../tables/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/convert.sh"

own TP 8
own PP 8

# shellcheck source=convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/convert.sh"

convert_hf2mcore "$@"
