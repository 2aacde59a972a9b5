#!/usr/bin/env bash
# Evaluates Qwen3-30B-A3B; LORA_LOAD adds an adapter.
#
#   CKPT_LOAD_DIR=./model_weights/qwen3_moe_mcore/ LORA_LOAD=./ckpt/qwen3_moe_lora \
#   TOKENIZER_PATH=./model_from_hf/qwen3_moe_hf/ TASK=mmlu DATA_PATH=./mmlu/test/ \
#       examples/mcore/qwen3_moe/evaluate_qwen3_30b_a3b_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/evaluate.sh; what is said here and in model.sh
# comes before; the rules: ../job.sh.

# shellcheck source=../tables/evaluate.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/evaluate.sh"

own NPROC "${NPUS_PER_NODE:-8}"
own TP 4
own PP 2

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

evaluate 6000 "$@"
