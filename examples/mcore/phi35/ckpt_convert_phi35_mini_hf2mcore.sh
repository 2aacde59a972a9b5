#!/usr/bin/env bash
# Turns a Hugging Face folder of Phi-3.5-mini into a Megatron checkpoint of TP x PP shards.
#
#   HF_MODEL_PATH=./model_from_hf/Phi-3.5-mini-instruct/ TP=1 PP=8 \
#   CKPT_SAVE_DIR=./model_weights/phi35_mini_mcore/ \
#       examples/mcore/phi35/ckpt_convert_phi35_mini_hf2mcore.sh [more flags]
#
# Flags, their variables and values: ../tables/convert.sh; what is said here and in convert.sh comes before; the
# rules: ../job.sh.

# shellcheck source=../tables/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/convert.sh"

own TP 1
own PP 8

# shellcheck source=convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/convert.sh"

convert_hf2mcore "$@"
