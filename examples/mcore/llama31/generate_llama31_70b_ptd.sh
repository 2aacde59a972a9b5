#!/usr/bin/env bash
# Generates text with Llama-3.1-70B; LORA_LOAD adds an adapter, TASK is greedy, do_sample or chat.
#
#   CKPT_LOAD_DIR=./model_weights/llama31-mcore/ LORA_LOAD=./ckpt/llama31_lora \
#   TOKENIZER_PATH=./model_from_hf/llama31-hf/ TASK=greedy \
#       examples/mcore/llama31/generate_llama31_70b_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/generate.sh; what is said here and in
# model-70b.sh and model.sh comes before; the rules: ../job.sh.

# shellcheck source=../tables/generate.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/generate.sh"

own TP 8
own SP 0

# shellcheck source=model-70b.sh
source "$(dirname "${BASH_SOURCE[0]}")/model-70b.sh"
# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

generate 6001 "$@"
