#!/usr/bin/env bash
# Turns a Hugging Face folder of Llama-2-7B into a Megatron checkpoint of TP x PP shards.
#
#   HF_MODEL_PATH=./model_from_hf/llama-2-7b-hf/ TP=8 PP=1 \
#   CKPT_SAVE_DIR=./model_weights/Llama2-mcore/ \
#       examples/mcore/llama2/ckpt_convert_llama2_hf2mcore.sh [more flags]
#
# Flags, their variables and values: ../tables/convert.sh; what is said here and in convert.sh comes before; the
# rules: ../job.sh.

# shellcheck source=../tables/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/convert.sh"

own TP 8
own PP 1
own TOKENIZER_MODEL ./model_from_hf/llama-2-7b-hf/tokenizer.model

# shellcheck source=convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/convert.sh"

convert_hf2mcore "$@"
