#!/usr/bin/env bash
# Turns a Hugging Face folder of Yi-34B into a Megatron checkpoint of TP x PP shards.
#
#   HF_MODEL_PATH=./model_from_hf/Yi-hf/ TP=8 PP=2 \
#   CKPT_SAVE_DIR=./model_weights/Yi-mcore/ \
#       examples/mcore/yi/ckpt_convert_yi_hf2mcore.sh [more flags]
#
# Flags, their variables and values: ../tables/convert.sh; what is said here and in convert.sh comes before; the
# rules: ../job.sh.

# shellcheck source=../tables/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/convert.sh"

own TP 8
own PP 2

# shellcheck source=convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/convert.sh"

convert_hf2mcore "$@"
