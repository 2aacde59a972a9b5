#!/usr/bin/env bash
# Evaluates CodeLlama-34B; LORA_LOAD adds an adapter.
#
#   CKPT_LOAD_DIR=./model_weights/Codellama-mcore/ LORA_LOAD=./ckpt/codellama_lora \
#   TOKENIZER_PATH=./model_from_hf/Codellama-hf/ TASK=mmlu DATA_PATH=./mmlu/test/ \
#       examples/mcore/codellama/evaluate_codellama_34b_lora_ptd.sh [more flags]
#
# TASK=human_eval ALLOW_CODE_EXECUTION=1 MAX_NEW_TOKENS=512 runs the programs that the model writes. Flags, their
# variables and values: ../tables/model.sh, ../tables/evaluate.sh; what is said here and in model.sh comes before;
# the rules: ../job.sh.

# shellcheck source=../tables/evaluate.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/evaluate.sh"

own TP 8
own SP 0

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

evaluate 6011 "$@"
