#!/usr/bin/env bash
# Turns a Hugging Face folder of Mixtral-8x7B into a Megatron checkpoint of TP x PP x EP shards.
#
#   HF_MODEL_PATH=./model_from_hf/Mixtral-8x7B/ TP=1 PP=4 EP=1 \
#   CKPT_SAVE_DIR=./model_weights/Mixtral-mcore/ \
#       examples/mcore/mixtral/ckpt_convert_mixtral_hf2mcore.sh [more flags]
#
# Flags, their variables and values: ../tables/convert.sh; what is said here and in convert.sh comes before; the
# rules: ../job.sh.

# shellcheck source=../tables/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/convert.sh"

own TP 1
own PP 4
own EP 1

# shellcheck source=convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/convert.sh"

convert_hf2mcore "$@"
