#!/usr/bin/env bash
# Evaluates DeepSeek-V3; LORA_LOAD adds an adapter.
#
#   CKPT_LOAD_DIR=./model_weights/deepseek3-mcore/ LORA_LOAD=./ckpt/deepseek3_lora \
#   TOKENIZER_PATH=./model_from_hf/deepseek3-bf16/ TASK=mmlu DATA_PATH=./mmlu/test/ \
#       examples/mcore/deepseek3/evaluate_deepseek3_671b_4k_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/evaluate.sh; what is said here and in model.sh
# comes before; the rules: ../job.sh.

# shellcheck source=../tables/evaluate.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/evaluate.sh"

own NPROC "${NPUS_PER_NODE:-8}"
own NNODES 8
own PP 4
own EP 16
own BROADCAST 1

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

evaluate 6000 "$@"
