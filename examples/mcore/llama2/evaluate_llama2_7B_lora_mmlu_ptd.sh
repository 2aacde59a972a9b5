#!/usr/bin/env bash
# Judges Llama-2-7B with a LoRA adapter on MMLU, over eight replicas of the model.
#
#   CKPT_LOAD_DIR=./model_weights/Llama2-mcore LORA_LOAD=./ckpt/llama-2-7b-lora DATA_PATH=./mmlu/test \
#   TOKENIZER_PATH=./model_from_hf/llama-2-7b-hf OUTPUT_DIR=./results \
#       examples/mcore/llama2/evaluate_llama2_7B_lora_mmlu_ptd.sh [more flags]
#
# DATA_PATH holds {subject}_test.csv, its sibling dev the solved examples. TASK names another benchmark or one of
# lm-evaluation-harness (docs/evaluation.md); LORA_LOAD= (empty) leaves the adapter out. Every line of the table is a
# flag, the variable that overrides it, and its value (../job.sh tells the rules). The launch: NPROC (or
# NPUS_PER_NODE) processes on each of NNODES machines, NODE_RANK, MASTER_ADDR, MASTER_PORT.

# shellcheck source=../job.sh
source "$(dirname "${BASH_SOURCE[0]}")/../job.sh"

own TP 1
own NPUS_PER_NODE 8

words  --task-data-path                        DATA_PATH                     "/../mmlu/test/"
words  --task                                  TASK                          mmlu
flag   --seq-length                            SEQ_LENGTH                    4096
flag   --max-new-tokens                        MAX_NEW_TOKENS                1
flag   --evaluation-batch-size                 EVALUATION_BATCH_SIZE         1
flag   --max-eval-samples                      MAX_EVAL_SAMPLES              ""
flag   --output-dir                            OUTPUT_DIR                    ""
flag   --max-position-embeddings               MAX_POSITION_EMBEDDINGS       4096
flag   --tensor-model-parallel-size            TP                            1
flag   --pipeline-model-parallel-size          PP                            1
flag   --num-layers                            NUM_LAYERS                    32
flag   --hidden-size                           HIDDEN_SIZE                   4096
flag   --ffn-hidden-size                       FFN_HIDDEN_SIZE               11008
flag   --num-attention-heads                   NUM_ATTENTION_HEADS           32
switch --swiglu                                SWIGLU                        1
switch --disable-bias-linear                   DISABLE_BIAS_LINEAR           1
flag   --load                                  CKPT_LOAD_DIR                 "your model ckpt path"
flag   --normalization                         NORMALIZATION                 RMSNorm
flag   --tokenizer-type                        TOKENIZER_TYPE                PretrainedFromHF
flag   --tokenizer-name-or-path                TOKENIZER_PATH                "your tokenizer path"
switch --tokenizer-not-use-fast                TOKENIZER_NOT_USE_FAST        1
switch --fp16                                  FP16                          1
switch --bf16                                  BF16                          0
flag   --prompt-type                           PROMPT_TYPE                   ""
switch --hf-chat-template                      HF_CHAT_TEMPLATE              0
flag   --micro-batch-size                      MICRO_BATCH_SIZE              1
switch --use-fused-rmsnorm                     USE_FUSED_RMSNORM             1
flag   --position-embedding-type               POSITION_EMBEDDING_TYPE       rope
switch --exit-on-missing-checkpoint            EXIT_ON_MISSING_CHECKPOINT    1
switch --no-load-rng                           NO_LOAD_RNG                   1
switch --no-load-optim                         NO_LOAD_OPTIM                 1
if [[ -n ${LORA_LOAD-unset} ]]; then
    flag   --lora-load            LORA_LOAD            "your lora ckpt path"
    flag   --lora-r               LORA_R               8
    flag   --lora-alpha           LORA_ALPHA           16
    switch --lora-fusion          LORA_FUSION          1
    words  --lora-target-modules  LORA_TARGET_MODULES  "linear_qkv linear_proj linear_fc1 linear_fc2"
fi
switch --qlora                                 QLORA                         0
switch --untie-embeddings-and-output-weights   UNTIE                         1
switch --no-masked-softmax-fusion              NO_MASKED_SOFTMAX_FUSION      1
flag   --make-vocab-size-divisible-by          MAKE_VOCAB_SIZE_DIVISIBLE_BY  1
switch --use-mcore-models                      USE_MCORE_MODELS              1
flag   --seed                                  SEED                          42

run_distributed 6011 evaluation.py "$@"
