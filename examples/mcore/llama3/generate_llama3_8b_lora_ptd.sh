#!/usr/bin/env bash
# Generates text with Llama-3-8B; LORA_LOAD adds an adapter, TASK is greedy, do_sample or chat.
#
#   CKPT_LOAD_DIR=./model_weights/llama3_mcore/ LORA_LOAD=./ckpt/llama3_lora \
#   TOKENIZER_PATH=./model_from_hf/llama3_hf/ TASK=greedy \
#       examples/mcore/llama3/generate_llama3_8b_lora_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/generate.sh; what is said here and in model.sh
# comes before; the rules: ../job.sh.

# shellcheck source=../tables/generate.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/generate.sh"

own TP 8
own SP 0

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

generate 6001 "$@"
