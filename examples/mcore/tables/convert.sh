# Sourced by the conversion scripts: the flags of convert_ckpt.py, one function a direction.
#
# A family's convert.sh, sourced after this, says HF_MODEL_PATH, MG_MODEL_PATH, LORA_PATH and MERGED_PATH by `own`
# (../job.sh).

# shellcheck source=../job.sh
source "$(dirname "${BASH_SOURCE[0]}")/../job.sh"

target_table() {
    flag   --target-tensor-parallel-size      TP                            1
    flag   --target-pipeline-parallel-size    PP                            1
    flag   --target-expert-parallel-size      EP                            ""
    flag   --expert-tensor-parallel-size      ETP                           ""
    switch --moe-tp-extend-ep                 MOE_TP_EXTEND_EP              0
    switch --moe-grouped-gemm                 MOE_GROUPED_GEMM              0
    flag   --num-layer-list                   NUM_LAYER_LIST                ""
    flag   --noop-layers                      NOOP_LAYERS                   ""
    flag   --num-layers-per-virtual-pipeline-stage VPP                      ""
}

# A Hugging Face folder has no layout; published scripts say 1.
hf_target_table() {
    flag   --target-tensor-parallel-size      HF_TP                         ""
    flag   --target-pipeline-parallel-size    HF_PP                         ""
}

adapter_table() {
    flag   --lora-r                           LORA_R                        8
    flag   --lora-alpha                       LORA_ALPHA                    16
    words  --lora-target-modules              LORA_TARGET_MODULES           "linear_qkv linear_proj linear_fc1 linear_fc2"
}

# convert FROM TO ARGUMENT ...: with what was put together before.
convert() {
    flag   --load-model-type                  LOAD_MODEL_TYPE               "$1"
    flag   --save-model-type                  SAVE_MODEL_TYPE               "$2"
    flag   --model-type                       MODEL_TYPE                    GPT
    switch --use-mcore-models                 USE_MCORE_MODELS              1
    flag   --model-type-hf                    MODEL_TYPE_HF                 ""
    flag   --params-dtype                     PARAMS_DTYPE                  ""
    switch --overwrite                        OVERWRITE                     0
    run_alone convert_ckpt.py "${@:3}"
}

# Hugging Face folder -> Megatron checkpoint.
convert_hf2mcore() {
    flag   --load-dir                         HF_MODEL_PATH                 ""
    flag   --save-dir                         CKPT_SAVE_DIR                 "$MG_MODEL_PATH"
    flag   --tokenizer-model                  TOKENIZER_MODEL               ""
    switch --qlora-nf4                        QLORA_NF4                     0
    flag   --quant-block-size                 QUANT_BLOCK_SIZE              ""
    switch --quant-double                     QUANT_DOUBLE                  0
    target_table
    convert hf mg "$@"
}

# Megatron checkpoint -> Hugging Face folder, <CKPT_SAVE_DIR>/mg2hf.
convert_mcore2hf() {
    flag   --load-dir                         CKPT_LOAD_DIR                 "$MG_MODEL_PATH"
    flag   --save-dir                         CKPT_SAVE_DIR                 "$HF_MODEL_PATH"
    flag   --hf-cfg-dir                       HF_CFG_DIR                    ""
    hf_target_table
    convert mg hf "$@"
}

# Base model and adapter -> merged Megatron checkpoint.
convert_mg2mg_lora() {
    flag   --load-dir                         CKPT_LOAD_DIR                 "$MG_MODEL_PATH"
    flag   --lora-load                        LORA_LOAD                     "$LORA_PATH"
    flag   --save-dir                         CKPT_SAVE_DIR                 "$MERGED_PATH"
    adapter_table
    target_table
    convert mg mg "$@"
}

# Base model and adapter -> merged Hugging Face folder, <CKPT_SAVE_DIR>/mg2hf.
convert_mcore2hf_lora() {
    flag   --load-dir                         CKPT_LOAD_DIR                 "$MG_MODEL_PATH"
    flag   --lora-load                        LORA_LOAD                     "$LORA_PATH"
    flag   --save-dir                         CKPT_SAVE_DIR                 "$HF_MODEL_PATH"
    flag   --hf-cfg-dir                       HF_CFG_DIR                    ""
    hf_target_table
    adapter_table
    convert mg hf "$@"
}

# Adapter -> PEFT folder, <CKPT_SAVE_DIR>/mg2hf. (The run's own <save>/adapter is the same.)
convert_lora2hf() {
    flag   --load-dir                         CKPT_LOAD_DIR                 "$LORA_PATH"
    flag   --save-dir                         CKPT_SAVE_DIR                 "$HF_MODEL_PATH"
    flag   --peft-moe-format                  PEFT_MOE_FORMAT               ""
    flag   --base-model-name                  BASE_MODEL_NAME               ""
    switch --load-checkpoint-loosely          LOAD_CHECKPOINT_LOOSELY       1
    switch --save-lora-to-hf                  SAVE_LORA_TO_HF               1
    hf_target_table
    adapter_table
    convert mg hf "$@"
}
