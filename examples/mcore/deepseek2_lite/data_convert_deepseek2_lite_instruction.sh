#!/usr/bin/env bash
# Turns instruction rows into the indexed data set that DeepSeek-V2-Lite-16B is trained on.
#
#   INPUT=./dataset/alpaca.parquet TOKENIZER_PATH=./model_from_hf/deepseek2_lite_hf/ \
#   OUTPUT_PREFIX=./finetune_dataset/alpaca \
#       examples/mcore/deepseek2_lite/data_convert_deepseek2_lite_instruction.sh [more flags]
#
# Flags, their variables and values: ../tables/data.sh; what is said here comes before; the rules: ../job.sh.

# shellcheck source=../tables/data.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/data.sh"

own TOKENIZER_PATH ./model_from_hf/deepseek2_lite_hf/
own PROMPT_TYPE deepseek2-lite

prepare "$@"
