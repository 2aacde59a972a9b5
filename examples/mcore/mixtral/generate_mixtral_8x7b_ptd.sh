#!/usr/bin/env bash
# Generates text with Mixtral-8x7B; LORA_LOAD adds an adapter, TASK is greedy, do_sample or chat.
#
#   CKPT_LOAD_DIR=./model_weights/Mixtral-mcore/ LORA_LOAD=./ckpt/mixtral-lora \
#   TOKENIZER_PATH=./model_from_hf/Mixtral-8x7B/ TASK=chat \
#       examples/mcore/mixtral/generate_mixtral_8x7b_ptd.sh [more flags]
#
# Flags, their variables and values: ../model_experts.sh, ../generate_experts.sh; the rules: ../job.sh.

# shellcheck source=../generate_experts.sh
source "$(dirname "${BASH_SOURCE[0]}")/../generate_experts.sh"
# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

own TP 1
own PP 4
own EP 1

generate 6001 "$@"
