#!/usr/bin/env bash
# Turns a Hugging Face folder of Qwen3-8B into a Megatron checkpoint of TP x PP shards.
#
#   HF_MODEL_PATH=./model_from_hf/qwen3_hf/ TP=1 PP=4 \
#   CKPT_SAVE_DIR=./model_weights/qwen3_mcore/ \
#       examples/mcore/qwen3/ckpt_convert_qwen3_hf2mcore.sh [more flags]
#
# Flags, their variables and values: ../tables/convert.sh; what is said here and in convert.sh comes before; the
# rules: ../job.sh.

# shellcheck source=../tables/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/convert.sh"

own TP 1
own PP 4

# shellcheck source=convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/convert.sh"

convert_hf2mcore "$@"
