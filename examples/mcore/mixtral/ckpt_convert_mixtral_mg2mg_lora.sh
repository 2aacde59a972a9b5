#!/usr/bin/env bash
# Merges a LoRA adapter into Mixtral-8x7B: a Megatron checkpoint of any TP x PP x EP.
#
#   CKPT_LOAD_DIR=./model_weights/Mixtral-mcore/ LORA_LOAD=./ckpt/mixtral-lora \
#   CKPT_SAVE_DIR=./model_weights/mixtral-lora2mcore \
#       examples/mcore/mixtral/ckpt_convert_mixtral_mg2mg_lora.sh [more flags]
#
# Flags, their variables and values: ../tables/convert.sh; what is said here and in convert.sh comes before; the
# rules: ../job.sh.

# shellcheck source=../tables/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/convert.sh"

own TP 8
own PP 1
own EP 1

# shellcheck source=convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/convert.sh"

convert_mg2mg_lora "$@"
