#!/usr/bin/env bash
# Evaluates Llama-3.2-1B; LORA_LOAD adds an adapter.
#
#   CKPT_LOAD_DIR=./model_weights/llama32-mcore/ LORA_LOAD=./ckpt/llama32_lora \
#   TOKENIZER_PATH=./model_from_hf/llama32-hf/ TASK=mmlu DATA_PATH=./mmlu/test/ \
#       examples/mcore/llama32/evaluate_llama32_1b_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/evaluate.sh; what is said here and in model.sh
# comes before; the rules: ../job.sh.

# shellcheck source=../tables/evaluate.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/evaluate.sh"

own SEQ_LENGTH 8192

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

evaluate 6011 "$@"
