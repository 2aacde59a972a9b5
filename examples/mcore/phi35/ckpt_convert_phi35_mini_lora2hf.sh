#!/usr/bin/env bash
# Writes the LoRA adapter of a run of Phi-3.5-mini as a PEFT folder, <CKPT_SAVE_DIR>/mg2hf. (The run's own
# <save>/adapter is the same.)
#
#   CKPT_LOAD_DIR=./ckpt/phi35_mini_lora CKPT_SAVE_DIR=./model_from_hf/Phi-3.5-mini-instruct/ \
#       examples/mcore/phi35/ckpt_convert_phi35_mini_lora2hf.sh [more flags]
#
# Flags, their variables and values: ../tables/convert.sh; what is said here and in convert.sh comes before; the
# rules: ../job.sh.

# shellcheck source=../tables/convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/convert.sh"

# shellcheck source=convert.sh
source "$(dirname "${BASH_SOURCE[0]}")/convert.sh"

convert_lora2hf "$@"
