#!/usr/bin/env bash
# Generates text with Phi-3.5-mini; LORA_LOAD adds an adapter, TASK is greedy, do_sample or chat.
#
#   CKPT_LOAD_DIR=./model_weights/phi35_mini_mcore/ LORA_LOAD=./ckpt/phi35_mini_lora \
#   TOKENIZER_PATH=./model_from_hf/Phi-3.5-mini-instruct/ TASK=greedy \
#       examples/mcore/phi35/generate_phi35_mini_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/generate.sh; what is said here and in model.sh
# comes before; the rules: ../job.sh.

# shellcheck source=../tables/generate.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/generate.sh"

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

generate 6001 "$@"
