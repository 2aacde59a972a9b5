#!/usr/bin/env bash
# Turns instruction rows into the indexed data set that Gemma-2-9B is trained on.
#
#   INPUT=./dataset/alpaca.parquet TOKENIZER_PATH=./model_from_hf/gemma2_hf/ \
#   OUTPUT_PREFIX=./finetune_dataset/alpaca \
#       examples/mcore/gemma2/data_convert_gemma2_instruction.sh [more flags]
#
# Flags, their variables and values: ../tables/data.sh; what is said here comes before; the rules: ../job.sh.

# shellcheck source=../tables/data.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/data.sh"

own TOKENIZER_PATH ./model_from_hf/gemma2_hf/
own PROMPT_TYPE gemma

prepare "$@"
