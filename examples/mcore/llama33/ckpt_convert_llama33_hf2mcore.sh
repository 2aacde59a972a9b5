#!/usr/bin/env bash
# Turns a Hugging Face folder of Llama-3.3-70B into a Megatron checkpoint of TP x PP shards.
#
#   HF_MODEL_PATH=./model_from_hf/llama33-hf/ TP=8 PP=1 \
#   CKPT_SAVE_DIR=./model_weights/llama33-mcore/ \
#       examples/mcore/llama33/ckpt_convert_llama33_hf2mcore.sh [more flags]
#
# Flags, their variables and values: ../tables/convert.sh; what is said here and in convert.sh comes before; the
# rules: ../job.sh.

# shellcheck source=../tables/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/convert.sh"

own TP 8
own PP 1

# shellcheck source=convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/convert.sh"

convert_hf2mcore "$@"
