#!/usr/bin/env bash
# Evaluates InternLM2.5-20B; LORA_LOAD adds an adapter.
#
#   CKPT_LOAD_DIR=./model_weights/internlm25-7b-mcore-tp8-pp1/ LORA_LOAD=./ckpt/internlm25_lora \
#   TOKENIZER_PATH=./model_from_hf/internlm25_7b_hf/ TASK=mmlu DATA_PATH=./mmlu/test/ \
#       examples/mcore/internlm25/evaluate_internlm25_20b_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/evaluate.sh; what is said here and in
# model-20b.sh and model.sh comes before; the rules: ../job.sh.

# shellcheck source=../tables/evaluate.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/evaluate.sh"

own TP 8
own SP 0

# shellcheck source=model-20b.sh
source "$(dirname "${BASH_SOURCE[0]}")/model-20b.sh"
# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

evaluate 6011 "$@"
