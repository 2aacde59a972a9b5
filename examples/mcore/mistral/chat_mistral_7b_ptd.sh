#!/usr/bin/env bash
# Talks with Mistral-7B-Instruct-v0.2; LORA_LOAD adds an adapter.
#
#   CKPT_LOAD_DIR=./model_weights/Mistral-mcore/ LORA_LOAD=./ckpt/mistral_lora \
#   TOKENIZER_PATH=./model_from_hf/Mistral-hf/ \
#       examples/mcore/mistral/chat_mistral_7b_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/generate.sh; what is said here and in model.sh
# comes before; the rules: ../job.sh.

# shellcheck source=../tables/generate.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/generate.sh"

own TP 8
own SP 0
own TASK chat

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

generate 6001 "$@"
