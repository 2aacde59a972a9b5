#!/usr/bin/env bash
# Turns instruction rows into the indexed data set that Phi-3.5-mini is trained on.
#
#   INPUT=./dataset/alpaca.parquet TOKENIZER_PATH=./model_from_hf/Phi-3.5-mini-instruct/ \
#   OUTPUT_PREFIX=./finetune_dataset/alpaca \
#       examples/mcore/phi35/data_convert_phi35_instruction.sh [more flags]
#
# Flags, their variables and values: ../tables/data.sh; what is said here comes before; the rules: ../job.sh.

# shellcheck source=../tables/data.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/data.sh"

own TOKENIZER_PATH ./model_from_hf/Phi-3.5-mini-instruct/
own PROMPT_TYPE phi3.5

prepare "$@"
