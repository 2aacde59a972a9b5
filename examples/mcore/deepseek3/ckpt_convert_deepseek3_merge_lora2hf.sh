#!/usr/bin/env bash
# Merges a LoRA adapter into DeepSeek-V3: a complete Hugging Face folder in <CKPT_SAVE_DIR>/mg2hf/.
#
#   CKPT_LOAD_DIR=./model_weights/deepseek3-mcore/ LORA_LOAD=./ckpt/deepseek3_lora \
#   CKPT_SAVE_DIR=./model_from_hf/deepseek3-bf16/ \
#       examples/mcore/deepseek3/ckpt_convert_deepseek3_merge_lora2hf.sh [more flags]
#
# Flags, their variables and values: ../convert_experts.sh; the rules: ../job.sh.

# shellcheck source=convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/convert.sh"

convert_mcore2hf_lora "$@"
