#!/usr/bin/env bash
# Evaluates GLM-4-9B; LORA_LOAD adds an adapter.
#
#   CKPT_LOAD_DIR=./model_weights/glm4_mcore LORA_LOAD=./ckpt/glm4_lora \
#   TOKENIZER_PATH=./model_from_hf/glm4_hf TASK=mmlu DATA_PATH=./mmlu/test/ \
#       examples/mcore/glm4/evaluate_glm4_9b_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/evaluate.sh; what is said here and in model.sh
# comes before; the rules: ../job.sh.

# shellcheck source=../tables/evaluate.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/evaluate.sh"

own TP 2
own PP 2
own SP 0

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

evaluate 6011 "$@"
