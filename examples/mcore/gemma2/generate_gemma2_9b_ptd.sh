#!/usr/bin/env bash
# Generates text with Gemma-2-9B; LORA_LOAD adds an adapter, TASK is greedy, do_sample or chat.
#
#   CKPT_LOAD_DIR=./model_weights/gemma2_mcore/ LORA_LOAD=./ckpt/gemma2_lora \
#   TOKENIZER_PATH=./model_from_hf/gemma2_hf/ TASK=greedy \
#       examples/mcore/gemma2/generate_gemma2_9b_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/generate.sh; what is said here and in model.sh
# comes before; the rules: ../job.sh.

# shellcheck source=../tables/generate.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/generate.sh"

own TP 8
own SP 0
own SEQ_LENGTH 8192

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

generate 6001 "$@"
