#!/usr/bin/env bash
# Evaluates Llama-3.3-70B; LORA_LOAD adds an adapter.
#
#   CKPT_LOAD_DIR=./model_weights/llama33-mcore/ LORA_LOAD=./ckpt/llama33_lora \
#   TOKENIZER_PATH=./model_from_hf/llama33-hf/ TASK=mmlu DATA_PATH=./mmlu/test/ \
#       examples/mcore/llama33/evaluate_llama33_70b_ptd.sh [more flags]
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

evaluate 6000 "$@"
