#!/usr/bin/env bash
# Turns a Hugging Face folder of Mistral-7B-Instruct-v0.2 into a Megatron checkpoint of TP x PP shards.
#
#   HF_MODEL_PATH=./model_from_hf/Mistral-hf/ TP=8 PP=1 \
#   CKPT_SAVE_DIR=./model_weights/Mistral-mcore/ \
#       examples/mcore/mistral/convert_ckpt_mistral_hf2mcore.sh [more flags]
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
