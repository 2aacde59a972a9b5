#!/usr/bin/env bash
# Generates text with Qwen2.5-7B; LORA_LOAD adds an adapter, TASK is greedy, do_sample or chat.
#
#   CKPT_LOAD_DIR=./model_weights/qwen2.5_mcore/ LORA_LOAD=./ckpt/qwen25_lora \
#   TOKENIZER_PATH=./model_from_hf/qwen2.5_7b_hf/ TASK=greedy \
#       examples/mcore/qwen25/generate_qwen25_7b_lora_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/generate.sh; what is said here and in model.sh
# comes before; the rules: ../job.sh.

# shellcheck source=../tables/generate.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/generate.sh"

own NPROC "${NPUS_PER_NODE:-1}"

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

generate 6000 "$@"
