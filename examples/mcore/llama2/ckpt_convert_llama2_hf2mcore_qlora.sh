#!/usr/bin/env bash
# Turns a Hugging Face folder into a Megatron checkpoint of TP x PP shards whose linears hold 4 bits a weight.
#
#   HF_MODEL_PATH=./model_from_hf/llama-2-70b-hf TP=2 CKPT_SAVE_DIR=./model_weights/Llama2-mcore \
#       examples/mcore/llama2/ckpt_convert_llama2_hf2mcore_qlora.sh [more flags]
#
# Training needs no such step: with --qlora it quantises what it reads. It saves the time of that and disk space.
#
# Every line of the table is a flag, the variable that overrides it, and its value (../job.sh tells the rules).

# shellcheck source=../job.sh
source "$(dirname "${BASH_SOURCE[0]}")/../job.sh"

hf_model=${HF_MODEL_PATH-./model_from_hf/llama-2-70b-hf/}

flag   --model-type                       MODEL_TYPE        GPT
flag   --load-model-type                  LOAD_MODEL_TYPE   hf
flag   --save-model-type                  SAVE_MODEL_TYPE   mg
flag   --target-tensor-parallel-size      TP                2
flag   --target-pipeline-parallel-size    PP                1
flag   --load-dir                         HF_MODEL_PATH     "$hf_model"
flag   --save-dir                         CKPT_SAVE_DIR     ./model_weights/Llama2-mcore/
flag   --tokenizer-model                  TOKENIZER_MODEL   "${hf_model%/}/tokenizer.model"
switch --use-mcore-models                 USE_MCORE_MODELS  1
switch --qlora-nf4                        QLORA_NF4         1
flag   --quant-block-size                 QUANT_BLOCK_SIZE  ""
switch --quant-double                     QUANT_DOUBLE      0
flag   --model-type-hf                    MODEL_TYPE_HF     llama2
flag   --params-dtype                     PARAMS_DTYPE      ""
switch --overwrite                        OVERWRITE         0

run_alone convert_ckpt.py "$@"
