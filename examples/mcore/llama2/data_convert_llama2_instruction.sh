#!/usr/bin/env bash
# Turns instruction rows into the indexed data set that Llama-2-7B is trained on.
#
#   INPUT=./dataset/alpaca.parquet TOKENIZER_PATH=./model_from_hf/llama-2-7b-hf/ \
#   OUTPUT_PREFIX=./finetune_dataset/alpaca \
#       examples/mcore/llama2/data_convert_llama2_instruction.sh [more flags]
#
# Flags, their variables and values: ../tables/data.sh; what is said here comes before; the rules: ../job.sh.

# shellcheck source=../tables/data.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/data.sh"

own TOKENIZER_PATH ./model_from_hf/llama-2-7b-hf/
own PROMPT_TYPE llama2
own OVERWRITE_CACHE 1

prepare "$@"
