#!/usr/bin/env bash
# Merges a LoRA adapter into Yi-34B: a complete Hugging Face folder in <CKPT_SAVE_DIR>/mg2hf/. Configuration and
# tokenizer come from HF_CFG_DIR, else from CKPT_SAVE_DIR where it is the model's original folder (nothing in it is
# touched), else from the Megatron checkpoint.
#
#   CKPT_LOAD_DIR=./model_weights/Yi-mcore/ LORA_LOAD=./ckpt/yi_lora \
#   CKPT_SAVE_DIR=./model_from_hf/Yi-hf/ \
#       examples/mcore/yi/ckpt_convert_yi_mcore2hf_lora.sh [more flags]
#
# Flags, their variables and values: ../tables/convert.sh; what is said here and in convert.sh comes before; the
# rules: ../job.sh.

# shellcheck source=../tables/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/convert.sh"

# shellcheck source=convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/convert.sh"

convert_mcore2hf_lora "$@"
