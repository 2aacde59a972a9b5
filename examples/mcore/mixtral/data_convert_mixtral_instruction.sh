#!/usr/bin/env bash
# Turns instruction rows into the indexed data set that Mixtral-8x7B is trained on.
#
#   INPUT=./dataset/alpaca.parquet TOKENIZER_PATH=./model_from_hf/Mixtral-8x7B/ \
#   OUTPUT_PREFIX=./finetune_dataset/alpaca \
#       examples/mcore/mixtral/data_convert_mixtral_instruction.sh [more flags]
#
# Flags, their variables and values: ../tables/data.sh; what is said here comes before; the rules: ../job.sh.

# shellcheck source=../tables/data.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/data.sh"

own TOKENIZER_PATH ./model_from_hf/Mixtral-8x7B/
own PROMPT_TYPE mixtral

prepare "$@"
