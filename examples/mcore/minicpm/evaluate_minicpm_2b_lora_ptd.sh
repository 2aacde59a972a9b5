#!/usr/bin/env bash
# Evaluates MiniCPM-2B; LORA_LOAD adds an adapter.
#
#   CKPT_LOAD_DIR=./model_weights/MiniCPM-2B-sft-mcore/ LORA_LOAD=./ckpt/minicpm_lora \
#   TOKENIZER_PATH=./model_from_hf/MiniCPM-2B-sft-bf16/ TASK=mmlu DATA_PATH=./mmlu/test/ \
#       examples/mcore/minicpm/evaluate_minicpm_2b_lora_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/evaluate.sh; what is said here and in model.sh
# comes before; the rules: ../job.sh.

# shellcheck source=../tables/evaluate.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/evaluate.sh"

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

evaluate 6011 "$@"
