#!/usr/bin/env bash
# Turns a Hugging Face folder of Qwen2-7B into a Megatron checkpoint of TP x PP shards.
#
#   HF_MODEL_PATH=./model_from_hf/qwen2_hf/ TP=1 PP=8 \
#   CKPT_SAVE_DIR=./model_weights/qwen2_mcore/ \
#       examples/mcore/qwen2/ckpt_convert_qwen2_hf2mcore.sh [more flags]
#
# Flags, their variables and values: ../tables/convert.sh; what is said here and in convert.sh comes before; the
# rules: ../job.sh.

# shellcheck source=../tables/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/convert.sh"

own TP 1
own PP 8
own NUM_LAYER_LIST 4,4,4,4,3,3,3,3

# shellcheck source=convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/convert.sh"

convert_hf2mcore "$@"
