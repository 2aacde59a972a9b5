#!/usr/bin/env bash
# Generates text with Mistral-7B-Instruct-v0.2; LORA_LOAD adds an adapter, TASK is greedy, do_sample or chat.
#
#   CKPT_LOAD_DIR=./model_weights/Mistral-mcore/ LORA_LOAD=./ckpt/mistral_lora \
#   TOKENIZER_PATH=./model_from_hf/Mistral-hf/ TASK=greedy \
#       examples/mcore/mistral/generate_mistral_7b_ptd.sh [more flags]
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
