#!/usr/bin/env bash
# Generates text with Llama-3.2-3B; LORA_LOAD adds an adapter, TASK is greedy, do_sample or chat.
#
#   CKPT_LOAD_DIR=./model_weights/llama32-mcore/ LORA_LOAD=./ckpt/llama32_lora \
#   TOKENIZER_PATH=./model_from_hf/llama32-hf/ TASK=greedy \
#       examples/mcore/llama32/generate_llama32_3b_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/generate.sh; what is said here and in model-3b.sh
# and model.sh comes before; the rules: ../job.sh.

# shellcheck source=../tables/generate.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/generate.sh"

own MICRO_BATCH_SIZE 4
own SEQ_LENGTH 8192

# shellcheck source=model-3b.sh
source "$(dirname "${BASH_SOURCE[0]}")/model-3b.sh"
# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

generate 6001 "$@"
