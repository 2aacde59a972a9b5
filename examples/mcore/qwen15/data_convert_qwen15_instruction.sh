#!/usr/bin/env bash
# Turns instruction rows into the indexed data set that Qwen1.5-32B is trained on.
#
#   INPUT=./dataset/alpaca.parquet TOKENIZER_PATH=./model_from_hf/qwen15_hf/ \
#   OUTPUT_PREFIX=./finetune_dataset/alpaca \
#       examples/mcore/qwen15/data_convert_qwen15_instruction.sh [more flags]
#
# Flags, their variables and values: ../tables/data.sh; what is said here comes before; the rules: ../job.sh.

# shellcheck source=../tables/data.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/data.sh"

own TOKENIZER_PATH ./model_from_hf/qwen15_hf/
own PROMPT_TYPE qwen

prepare "$@"
