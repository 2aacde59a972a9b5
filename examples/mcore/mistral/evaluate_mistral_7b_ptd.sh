#!/usr/bin/env bash
# Evaluates Mistral-7B-Instruct-v0.2; LORA_LOAD adds an adapter.
#
#   CKPT_LOAD_DIR=./model_weights/Mistral-mcore/ LORA_LOAD=./ckpt/mistral_lora \
#   TOKENIZER_PATH=./model_from_hf/Mistral-hf/ TASK=mmlu DATA_PATH=./mmlu/test/ \
#       examples/mcore/mistral/evaluate_mistral_7b_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/evaluate.sh; what is said here and in model.sh
# comes before; the rules: ../job.sh.

# shellcheck source=../tables/evaluate.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/evaluate.sh"

own TP 8
own SP 0

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

evaluate 6011 "$@"
