#!/usr/bin/env bash
# Generates text with GLM-4-9B; LORA_LOAD adds an adapter, TASK is greedy, do_sample or chat.
#
#   CKPT_LOAD_DIR=./model_weights/glm4_mcore LORA_LOAD=./ckpt/glm4_lora \
#   TOKENIZER_PATH=./model_from_hf/glm4_hf TASK=greedy \
#       examples/mcore/glm4/generate_glm4_9b_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/generate.sh; what is said here and in model.sh
# comes before; the rules: ../job.sh.

# shellcheck source=../tables/generate.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/generate.sh"

own TP 2
own PP 2
own SP 0

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

generate 6001 "$@"
