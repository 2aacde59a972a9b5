#!/usr/bin/env bash
# Turns instruction rows into the indexed data set that Yi-34B is trained on.
#
#   INPUT=./dataset/alpaca.parquet TOKENIZER_PATH=./model_from_hf/Yi-hf/ \
#   OUTPUT_PREFIX=./finetune_dataset/alpaca \
#       examples/mcore/yi/data_convert_yi_instruction.sh [more flags]
#
# Flags, their variables and values: ../tables/data.sh; what is said here comes before; the rules: ../job.sh.

# shellcheck source=../tables/data.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/data.sh"

own TOKENIZER_PATH ./model_from_hf/Yi-hf/
own PROMPT_TYPE chatml

prepare "$@"
