#!/usr/bin/env bash
# Turns a Hugging Face folder of DeepSeek-V3 into a Megatron checkpoint of TP x PP x EP shards.
#
#   HF_MODEL_PATH=./model_from_hf/deepseek3-bf16/ TP=1 PP=4 EP=16 \
#   CKPT_SAVE_DIR=./model_weights/deepseek3-mcore/ \
#       examples/mcore/deepseek3/ckpt_convert_deepseek3_hf2mcore.sh [more flags]
#
# Flags, their variables and values: ../tables/convert.sh; what is said here and in convert.sh comes before; the
# rules: ../job.sh.

# shellcheck source=../tables/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/convert.sh"

own TP 1
own PP 4
own EP 16
own NUM_LAYER_LIST 15,15,16,15

# shellcheck source=convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/convert.sh"

convert_hf2mcore "$@"
