#!/usr/bin/env bash
# Turns instruction rows into the indexed data set that DeepSeek-V3 is trained on.
#
#   INPUT=./dataset/alpaca.parquet TOKENIZER_PATH=./model_from_hf/deepseek3-bf16/ \
#   OUTPUT_PREFIX=./finetune_dataset/alpaca \
#       examples/mcore/deepseek3/data_convert_deepseek3_instruction.sh [more flags]
#
# Flags, their variables and values: ../tables/data.sh; what is said here comes before; the rules: ../job.sh.

# shellcheck source=../tables/data.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/data.sh"

own TOKENIZER_PATH ./model_from_hf/deepseek3-bf16/
own PROMPT_TYPE deepseek3

prepare "$@"
