#!/usr/bin/env bash
# Talks with Qwen2.5-7B; LORA_LOAD adds an adapter.
#
#   CKPT_LOAD_DIR=./model_weights/qwen2.5_mcore/ LORA_LOAD=./ckpt/qwen25_lora \
#   TOKENIZER_PATH=./model_from_hf/qwen2.5_7b_hf/ \
#       examples/mcore/qwen25/chat_qwen25_7b_lora_ptd.sh [more flags]
#
# Flags, their variables and values: ../tables/model.sh, ../tables/generate.sh; what is said here and in model.sh
# comes before; the rules: ../job.sh.

# shellcheck source=../tables/generate.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/generate.sh"

own NPROC "${NPUS_PER_NODE:-1}"
own TASK chat

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

generate 6000 "$@"
