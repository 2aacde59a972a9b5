#!/usr/bin/env bash
# Merges a LoRA adapter into Phi-3.5-mini: a Megatron checkpoint of any TP x PP.
#
#   CKPT_LOAD_DIR=./model_weights/phi35_mini_mcore/ LORA_LOAD=./ckpt/phi35_mini_lora \
#   CKPT_SAVE_DIR=./model_weights/phi35_mini_lora2mcore \
#       examples/mcore/phi35/ckpt_convert_phi35_mini_mg2mg_lora.sh [more flags]
#
# Flags, their variables and values: ../tables/convert.sh; what is said here and in convert.sh comes before; the
# rules: ../job.sh.

# shellcheck source=../tables/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/convert.sh"

own TP 1
own PP 8

# shellcheck source=convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/convert.sh"

convert_mg2mg_lora "$@"
