#!/usr/bin/env bash
# Evaluates Qwen1.5-32B; LORA_LOAD adds an adapter.
#
#   CKPT_LOAD_DIR=./model_weights/qwen15_mcore/ LORA_LOAD=./ckpt/qwen15_lora \
#   TOKENIZER_PATH=./model_from_hf/qwen15_hf/ TASK=mmlu DATA_PATH=./mmlu/test/ \
#       examples/mcore/qwen15/evaluate_qwen15_32b_ptd.sh [more flags]
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
