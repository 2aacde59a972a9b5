#!/usr/bin/env bash
# Evaluates Qwen3-0.6B; LORA_LOAD adds an adapter.
#
#   CKPT_LOAD_DIR=./model_weights/qwen3_mcore/ LORA_LOAD=./ckpt/qwen3_lora \
#   TOKENIZER_PATH=./model_from_hf/qwen3_hf/ TASK=mmlu DATA_PATH=./mmlu/test/ \
#       examples/mcore/qwen3/evaluate_qwen3_0point6b_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/evaluate.sh; what is said here and in
# model-0point6b.sh and model.sh comes before; the rules: ../job.sh.

# shellcheck source=../tables/evaluate.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/evaluate.sh"

# shellcheck source=model-0point6b.sh
source "$(dirname "${BASH_SOURCE[0]}")/model-0point6b.sh"
# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

evaluate 6015 "$@"
