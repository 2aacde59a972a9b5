#!/usr/bin/env bash
# Evaluates Phi-3.5-mini; LORA_LOAD adds an adapter.
#
#   CKPT_LOAD_DIR=./model_weights/phi35_mini_mcore/ LORA_LOAD=./ckpt/phi35_mini_lora \
#   TOKENIZER_PATH=./model_from_hf/Phi-3.5-mini-instruct/ TASK=mmlu DATA_PATH=./mmlu/test/ \
#       examples/mcore/phi35/evaluate_phi35_mini_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/evaluate.sh; what is said here and in model.sh
# comes before; the rules: ../job.sh.

# shellcheck source=../tables/evaluate.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/evaluate.sh"

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

evaluate 6011 "$@"
