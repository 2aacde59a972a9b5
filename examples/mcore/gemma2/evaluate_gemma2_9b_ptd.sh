#!/usr/bin/env bash
# Evaluates Gemma-2-9B; LORA_LOAD adds an adapter.
#
#   CKPT_LOAD_DIR=./model_weights/gemma2_mcore/ LORA_LOAD=./ckpt/gemma2_lora \
#   TOKENIZER_PATH=./model_from_hf/gemma2_hf/ TASK=mmlu DATA_PATH=./mmlu/test/ \
#       examples/mcore/gemma2/evaluate_gemma2_9b_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/evaluate.sh; what is said here and in model.sh
# comes before; the rules: ../job.sh.

# shellcheck source=../tables/evaluate.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/evaluate.sh"

own TP 8
own SP 0
own SEQ_LENGTH 8192

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

evaluate 6011 "$@"
