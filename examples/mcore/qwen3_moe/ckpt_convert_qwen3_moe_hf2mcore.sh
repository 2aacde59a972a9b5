#!/usr/bin/env bash
# Turns a Hugging Face folder of Qwen3-30B-A3B into a Megatron checkpoint of TP x PP x EP shards.
#
#   HF_MODEL_PATH=./model_from_hf/qwen3_moe_hf/ TP=4 PP=1 EP=1 \
#   CKPT_SAVE_DIR=./model_weights/qwen3_moe_mcore/ \
#       examples/mcore/qwen3_moe/ckpt_convert_qwen3_moe_hf2mcore.sh [more flags]
#
# Flags, their variables and values: ../tables/convert.sh; what is said here and in convert.sh comes before; the
# rules: ../job.sh.

# shellcheck source=../tables/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/convert.sh"

own TP 4
own PP 1
own EP 1

# shellcheck source=convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/convert.sh"

convert_hf2mcore "$@"
