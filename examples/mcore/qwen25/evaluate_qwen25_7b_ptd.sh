#!/usr/bin/env bash
# Evaluates Qwen2.5-7B; LORA_LOAD adds an adapter.
#
#   CKPT_LOAD_DIR=./model_weights/qwen2.5_mcore/ LORA_LOAD=./ckpt/qwen25_lora \
#   TOKENIZER_PATH=./model_from_hf/qwen2.5_7b_hf/ TASK=mmlu DATA_PATH=./mmlu/test/ \
#       examples/mcore/qwen25/evaluate_qwen25_7b_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/evaluate.sh; what is said here and in model.sh
# comes before; the rules: ../job.sh.

# shellcheck source=../tables/evaluate.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/evaluate.sh"

own TP 4
own PP 2
own SP 0
own SEQ_LENGTH 32768
own NO_CHAT_TEMPLATE 1

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

evaluate 6000 "$@"
