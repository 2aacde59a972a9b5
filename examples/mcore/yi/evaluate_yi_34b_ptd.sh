#!/usr/bin/env bash
# Evaluates Yi-34B; LORA_LOAD adds an adapter.
#
#   CKPT_LOAD_DIR=./model_weights/Yi-mcore/ LORA_LOAD=./ckpt/yi_lora \
#   TOKENIZER_PATH=./model_from_hf/Yi-hf/ TASK=mmlu DATA_PATH=./mmlu/test/ \
#       examples/mcore/yi/evaluate_yi_34b_ptd.sh [more flags]
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
