#!/usr/bin/env bash
# Turns instruction rows into the indexed data set that Mistral-7B-Instruct-v0.2 is trained on.
#
#   INPUT=./dataset/alpaca.parquet TOKENIZER_PATH=./model_from_hf/Mistral-hf/ \
#   OUTPUT_PREFIX=./finetune_dataset/alpaca \
#       examples/mcore/mistral/data_convert_mistral_instruction.sh [more flags]
#
# Flags, their variables and values: ../tables/data.sh; what is said here comes before; the rules: ../job.sh.

# shellcheck source=../tables/data.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/data.sh"

own TOKENIZER_PATH ./model_from_hf/Mistral-hf/
own PROMPT_TYPE mistral

prepare "$@"
