#!/usr/bin/env bash
# Generates text with MiniCPM-2B; LORA_LOAD adds an adapter, TASK is greedy, do_sample or chat.
#
#   CKPT_LOAD_DIR=./model_weights/MiniCPM-2B-sft-mcore/ LORA_LOAD=./ckpt/minicpm_lora \
#   TOKENIZER_PATH=./model_from_hf/MiniCPM-2B-sft-bf16/ TASK=greedy \
#       examples/mcore/minicpm/generate_minicpm_2b_lora_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/generate.sh; what is said here and in model.sh
# comes before; the rules: ../job.sh.

# shellcheck source=../tables/generate.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/generate.sh"

own MICRO_BATCH_SIZE 4

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

generate 6001 "$@"
