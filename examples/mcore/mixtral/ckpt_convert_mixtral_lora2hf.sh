#!/usr/bin/env bash
# Writes the LoRA adapter of a run of Mixtral-8x7B as a PEFT folder, <CKPT_SAVE_DIR>/mg2hf. (The run's own
# <save>/adapter is the same.)
#
#   CKPT_LOAD_DIR=./ckpt/mixtral-lora CKPT_SAVE_DIR=./model_from_hf/Mixtral-8x7B/ \
#       examples/mcore/mixtral/ckpt_convert_mixtral_lora2hf.sh [more flags]
#
# Flags, their variables and values: ../tables/convert.sh; what is said here and in convert.sh comes before; the
# rules: ../job.sh.

# shellcheck source=../tables/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/convert.sh"

# shellcheck source=convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/convert.sh"

convert_lora2hf "$@"
