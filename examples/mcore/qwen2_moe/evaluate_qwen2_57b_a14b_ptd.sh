#!/usr/bin/env bash
# Evaluates Qwen2-57B-A14B; LORA_LOAD adds an adapter.
#
#   CKPT_LOAD_DIR=./model_weights/qwen2_moe_mcore/ LORA_LOAD=./ckpt/qwen2_moe_lora \
#   TOKENIZER_PATH=./model_from_hf/qwen2_moe_hf/ TASK=mmlu DATA_PATH=./mmlu/test/ \
#       examples/mcore/qwen2_moe/evaluate_qwen2_57b_a14b_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/evaluate.sh; what is said here and in model.sh
# comes before; the rules: ../job.sh.

# shellcheck source=../tables/evaluate.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/evaluate.sh"

own NPROC "${NPUS_PER_NODE:-8}"
own TP 2
own PP 4

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

evaluate 6000 "$@"
