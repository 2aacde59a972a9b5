#!/usr/bin/env bash
# Evaluates Llama-3.1-8B; LORA_LOAD adds an adapter.
#
#   CKPT_LOAD_DIR=./model_weights/llama31-mcore/ LORA_LOAD=./ckpt/llama31_lora \
#   TOKENIZER_PATH=./model_from_hf/llama31-hf/ TASK=mmlu DATA_PATH=./mmlu/test/ \
#       examples/mcore/llama31/evaluate_llama31_8b_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/evaluate.sh; what is said here and in model.sh
# comes before; the rules: ../job.sh.

# shellcheck source=../tables/evaluate.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/evaluate.sh"

own TP 8
own SP 0
own SEQ_LENGTH 131072

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

evaluate 6011 "$@"
