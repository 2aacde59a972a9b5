#!/usr/bin/env bash
# Turns instruction rows into the indexed data set that Llama-3.2-1B is trained on.
#
#   INPUT=./dataset/alpaca.parquet TOKENIZER_PATH=./model_from_hf/llama32-hf/ \
#   OUTPUT_PREFIX=./finetune_dataset/alpaca \
#       examples/mcore/llama32/data_convert_llama32_instruction.sh [more flags]
#
# Flags, their variables and values: ../tables/data.sh; what is said here comes before; the rules: ../job.sh.

# shellcheck source=../tables/data.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/data.sh"

own TOKENIZER_PATH ./model_from_hf/llama32-hf/
own PROMPT_TYPE llama3

prepare "$@"
