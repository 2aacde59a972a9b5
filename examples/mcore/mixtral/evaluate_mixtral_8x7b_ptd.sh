#!/usr/bin/env bash
# Evaluates Mixtral-8x7B; LORA_LOAD adds an adapter.
#
#   CKPT_LOAD_DIR=./model_weights/Mixtral-mcore/ LORA_LOAD=./ckpt/mixtral-lora \
#   TOKENIZER_PATH=./model_from_hf/Mixtral-8x7B/ TASK=mmlu DATA_PATH=./mmlu/test/ \
#       examples/mcore/mixtral/evaluate_mixtral_8x7b_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/evaluate.sh; what is said here and in model.sh
# comes before; the rules: ../job.sh.

# shellcheck source=../tables/evaluate.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/evaluate.sh"

own NPROC "${NPUS_PER_NODE:-8}"
own TP 8
own SP 0
own SEQ_LENGTH 32768
own MAX_NEW_TOKENS 2
own ALTERNATIVE_PROMPT 1

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

evaluate 6000 "$@"
