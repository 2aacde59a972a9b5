#!/usr/bin/env bash
# Evaluates DeepSeek-V2-Lite-16B; LORA_LOAD adds an adapter.
#
#   CKPT_LOAD_DIR=./model_weights/deepseek2_lite_mcore/ LORA_LOAD=./ckpt/deepseek2_lite_lora \
#   TOKENIZER_PATH=./model_from_hf/deepseek2_lite_hf/ TASK=mmlu DATA_PATH=./mmlu/test/ \
#       examples/mcore/deepseek2_lite/evaluate_deepseek2_lite_16b_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/evaluate.sh; what is said here and in model.sh
# comes before; the rules: ../job.sh.

# shellcheck source=../tables/evaluate.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/evaluate.sh"

own NPROC "${NPUS_PER_NODE:-8}"
own EP 8
own BROADCAST 1

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

evaluate 6000 "$@"
