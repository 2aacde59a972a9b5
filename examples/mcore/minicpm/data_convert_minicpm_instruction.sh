#!/usr/bin/env bash
# Turns instruction rows into the indexed data set that MiniCPM-2B is trained on.
#
#   INPUT=./dataset/alpaca.parquet TOKENIZER_PATH=./model_from_hf/MiniCPM-2B-sft-bf16/ \
#   OUTPUT_PREFIX=./finetune_dataset/alpaca \
#       examples/mcore/minicpm/data_convert_minicpm_instruction.sh [more flags]
#
# Flags, their variables and values: ../tables/data.sh; what is said here comes before; the rules: ../job.sh.

# shellcheck source=../tables/data.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/data.sh"

own TOKENIZER_PATH ./model_from_hf/MiniCPM-2B-sft-bf16/
own PROMPT_TYPE cpm

prepare "$@"
