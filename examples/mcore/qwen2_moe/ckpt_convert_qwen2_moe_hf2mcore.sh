#!/usr/bin/env bash
# Turns a Hugging Face folder of Qwen2-57B-A14B into a Megatron checkpoint of TP x PP x EP shards.
#
#   HF_MODEL_PATH=./model_from_hf/qwen2_moe_hf/ TP=2 PP=4 EP=1 \
#   CKPT_SAVE_DIR=./model_weights/qwen2_moe_mcore/ \
#       examples/mcore/qwen2_moe/ckpt_convert_qwen2_moe_hf2mcore.sh [more flags]
#
# Flags, their variables and values: ../tables/convert.sh; what is said here and in convert.sh comes before; the
# rules: ../job.sh.

# shellcheck source=../tables/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/convert.sh"

own TP 2
own PP 4
own EP 1

# shellcheck source=convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/convert.sh"

convert_hf2mcore "$@"
