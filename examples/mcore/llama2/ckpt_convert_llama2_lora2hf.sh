#!/usr/bin/env bash
# Writes the LoRA adapter of a training run as a PEFT folder: <CKPT_SAVE_DIR>/mg2hf/adapter_model.safetensors and
# adapter_config.json. (The run's own <save>/adapter is the same.)
#
#   CKPT_LOAD_DIR=./ckpt/llama2_lora_filter CKPT_SAVE_DIR=./model_from_hf/llama-2-7b-hf \
#       examples/mcore/llama2/ckpt_convert_llama2_lora2hf.sh [more flags]
#
# Every line of the table is a flag, the variable that overrides it, and its value (../job.sh tells the rules).

# shellcheck source=../job.sh
source "$(dirname "${BASH_SOURCE[0]}")/../job.sh"

flag   --model-type                       MODEL_TYPE               GPT
switch --use-mcore-models                 USE_MCORE_MODELS         1
flag   --load-model-type                  LOAD_MODEL_TYPE          mg
flag   --save-model-type                  SAVE_MODEL_TYPE          hf
flag   --load-dir                         CKPT_LOAD_DIR            ./ckpt/llama2_lora_filter
flag   --lora-r                           LORA_R                   16
flag   --lora-alpha                       LORA_ALPHA               32
words  --lora-target-modules              LORA_TARGET_MODULES      "linear_qkv linear_proj linear_fc1 linear_fc2"
flag   --target-tensor-parallel-size      TP                       1
flag   --target-pipeline-parallel-size    PP                       1
switch --load-checkpoint-loosely          LOAD_CHECKPOINT_LOOSELY  1
switch --save-lora-to-hf                  SAVE_LORA_TO_HF          1
flag   --save-dir                         CKPT_SAVE_DIR            ./model_from_hf/llama-2-7b-hf/
flag   --base-model-name                  BASE_MODEL_NAME          ""
switch --overwrite                        OVERWRITE                0

run_alone convert_ckpt.py "$@"
