#!/usr/bin/env bash
# Turns a Hugging Face folder of Llama-2-70B into a Megatron checkpoint of TP x PP shards whose linears hold 4 bits
# a weight.
#
#   HF_MODEL_PATH=./model_from_hf/llama-2-70b-hf/ TP=2 PP=1 \
#   CKPT_SAVE_DIR=./model_weights/Llama2-mcore/ \
#       examples/mcore/llama2/ckpt_convert_llama2_hf2mcore_qlora.sh [more flags]
#
# Training needs no such step: with --qlora it quantises what it reads. It saves the time of that and disk space.
# Flags, their variables and values: ../tables/convert.sh; what is said here and in convert.sh comes before; the
# rules: ../job.sh.

# shellcheck source=../tables/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/convert.sh"

own HF_MODEL_PATH ./model_from_hf/llama-2-70b-hf/
own TP 2
own TOKENIZER_MODEL ./model_from_hf/llama-2-70b-hf/tokenizer.model
own QLORA_NF4 1

# shellcheck source=convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/convert.sh"

convert_hf2mcore "$@"
