#!/usr/bin/env bash
# Turns a Hugging Face folder of GLM-4-9B into a Megatron checkpoint of TP x PP shards.
#
#   HF_MODEL_PATH=./model_from_hf/glm4_hf TP=2 PP=2 \
#   CKPT_SAVE_DIR=./model_weights/glm4_mcore \
#       examples/mcore/glm4/ckpt_convert_glm4_hf2mcore.sh [more flags]
#
# Flags, their variables and values: ../tables/convert.sh; what is said here and in convert.sh comes before; the
# rules: ../job.sh.

# shellcheck source=../tables/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/convert.sh"

own TP 2
own PP 2

# shellcheck source=convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/convert.sh"

convert_hf2mcore "$@"
