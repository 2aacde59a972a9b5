#!/usr/bin/env bash
# Evaluates Llama-2-7B; LORA_LOAD adds an adapter.
#
#   CKPT_LOAD_DIR=./model_weights/Llama2-mcore/ LORA_LOAD=./ckpt/llama-2-7b-lora \
#   TOKENIZER_PATH=./model_from_hf/llama-2-7b-hf/ TASK=mmlu DATA_PATH=./mmlu/test/ \
#       examples/mcore/llama2/evaluate_llama2_7b_full_mmlu_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/evaluate.sh; what is said here and in model.sh
# comes before; the rules: ../job.sh.

# shellcheck source=../tables/evaluate.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/evaluate.sh"

own NPROC "${NPUS_PER_NODE:-1}"
own DATA_PATH /../mmlu/test/
own SP 0
own BF16 0
own FP16 1
own TOKENIZER_NOT_USE_FAST 1
own EXIT_ON_MISSING_CHECKPOINT 1

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

evaluate 6011 "$@"
