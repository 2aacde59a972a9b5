#!/usr/bin/env bash
# Turns a Hugging Face folder of MiniCPM-2B into a Megatron checkpoint of TP x PP shards.
#
#   HF_MODEL_PATH=./model_from_hf/MiniCPM-2B-sft-bf16/ TP=1 PP=1 \
#   CKPT_SAVE_DIR=./model_weights/MiniCPM-2B-sft-mcore/ \
#       examples/mcore/minicpm/ckpt_convert_minicpm_hf2mcore.sh [more flags]
#
# Flags, their variables and values: ../tables/convert.sh; what is said here and in convert.sh comes before; the
# rules: ../job.sh.

# shellcheck source=../tables/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/convert.sh"

own TP 1
own PP 1

# shellcheck source=convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/convert.sh"

convert_hf2mcore "$@"
