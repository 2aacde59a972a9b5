#!/usr/bin/env bash
# Generates text with Qwen1.5-7B; LORA_LOAD adds an adapter, TASK is greedy, do_sample or chat.
#
#   CKPT_LOAD_DIR=./model_weights/qwen15_mcore/ LORA_LOAD=./ckpt/qwen15_lora \
#   TOKENIZER_PATH=./model_from_hf/qwen15_hf/ TASK=greedy \
#       examples/mcore/qwen15/generate_qwen15_7b_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/generate.sh; what is said here and in model-7b.sh
# and model.sh comes before; the rules: ../job.sh.

# shellcheck source=../tables/generate.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/generate.sh"

own TP 8
own SP 0

# shellcheck source=model-7b.sh
source "$(dirname "${BASH_SOURCE[0]}")/model-7b.sh"
# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

generate 6001 "$@"
