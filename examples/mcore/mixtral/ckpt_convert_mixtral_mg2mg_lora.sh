#!/usr/bin/env bash
# Merges a LoRA adapter into Mixtral-8x7B: a Megatron checkpoint of any TP x PP x EP.
#
#   CKPT_LOAD_DIR=./model_weights/Mixtral-mcore/ LORA_LOAD=./ckpt/mixtral-lora \
#   CKPT_SAVE_DIR=./model_weights/mixtral-lora2mcore \
#       examples/mcore/mixtral/ckpt_convert_mixtral_mg2mg_lora.sh [more flags]
#
# Flags, their variables and values: ../convert_experts.sh; the rules: ../job.sh.

# shellcheck source=convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/convert.sh"

own TP 8

convert_mg2mg_lora "$@"
