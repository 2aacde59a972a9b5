#!/usr/bin/env bash
# Generates text with Llama-2-7B and a LoRA adapter over eight tensor-parallel ranks.
#
#   CKPT_LOAD_DIR=./model_weights/Llama2-mcore LORA_LOAD=./ckpt/llama-2-7b-lora \
#   TOKENIZER_PATH=./model_from_hf/llama-2-7b-hf TOKENIZER_MODEL= TASK=chat \
#       examples/mcore/llama2/generate_llama2_7b_lora_ptd.sh [more flags]
#
# TASK is greedy, do_sample, beam_search, beam_search_with_sampling or chat; PROMPT or PROMPT_FILE what is asked;
# LORA_LOAD= (empty) leaves the adapter out.
# Every line of the table is a flag, the variable that overrides it, and its value (../job.sh tells the rules). The
# launch: NPROC (or NPUS_PER_NODE) processes on each of NNODES machines, NODE_RANK, MASTER_ADDR, MASTER_PORT.

# shellcheck source=../job.sh
source "$(dirname "${BASH_SOURCE[0]}")/../job.sh"

if [[ -n ${LORA_LOAD-unset} ]]; then
    flag   --lora-load            LORA_LOAD            "your lora model directory path"
    flag   --lora-r               LORA_R               16
    flag   --lora-alpha           LORA_ALPHA           32
    switch --lora-fusion          LORA_FUSION          1
    words  --lora-target-modules  LORA_TARGET_MODULES  "linear_qkv linear_proj linear_fc1 linear_fc2"
fi
switch --qlora                                 QLORA                         0
words  --task                                  TASK                          ""
flag   --prompt                                PROMPT                        ""
flag   --prompt-file                           PROMPT_FILE                   ""
flag   --output-file                           OUTPUT_FILE                   ""
flag   --prompt-type                           PROMPT_TYPE                   llama2
switch --hf-chat-template                      HF_CHAT_TEMPLATE              0
flag   --tensor-model-parallel-size            TP                            8
flag   --pipeline-model-parallel-size          PP                            1
switch --use-mcore-models                      USE_MCORE_MODELS              1
switch --use-kv-cache                          USE_KV_CACHE                  1
switch --use-flash-attn                        USE_FLASH_ATTN                1
switch --use-fused-swiglu                      USE_FUSED_SWIGLU              1
switch --use-fused-rmsnorm                     USE_FUSED_RMSNORM             1
switch --use-fused-rotary-pos-emb              USE_FUSED_ROTARY_POS_EMB      1
flag   --num-layers                            NUM_LAYERS                    32
flag   --hidden-size                           HIDDEN_SIZE                   4096
flag   --ffn-hidden-size                       FFN_HIDDEN_SIZE               11008
flag   --position-embedding-type               POSITION_EMBEDDING_TYPE       rope
flag   --seq-length                            SEQ_LENGTH                    4096
flag   --max-new-tokens                        MAX_NEW_TOKENS                256
flag   --micro-batch-size                      MICRO_BATCH_SIZE              4
flag   --global-batch-size                     GLOBAL_BATCH_SIZE             16
flag   --num-attention-heads                   NUM_ATTENTION_HEADS           32
flag   --max-position-embeddings               MAX_POSITION_EMBEDDINGS       4096
switch --swiglu                                SWIGLU                        1
flag   --load                                  CKPT_LOAD_DIR                 "your model directory path"
flag   --tokenizer-type                        TOKENIZER_TYPE                PretrainedFromHF
flag   --tokenizer-name-or-path                TOKENIZER_PATH                "your tokenizer directory path"
flag   --tokenizer-model                       TOKENIZER_MODEL               "your tokenizer.model file path"
switch --tokenizer-not-use-fast                TOKENIZER_NOT_USE_FAST        1
switch --fp16                                  FP16                          1
switch --bf16                                  BF16                          0
flag   --normalization                         NORMALIZATION                 RMSNorm
switch --untie-embeddings-and-output-weights   UNTIE                         1
switch --disable-bias-linear                   DISABLE_BIAS_LINEAR           1
switch --attention-softmax-in-fp32             ATTENTION_SOFTMAX_IN_FP32     1
switch --no-load-optim                         NO_LOAD_OPTIM                 1
switch --no-load-rng                           NO_LOAD_RNG                   1
switch --no-masked-softmax-fusion              NO_MASKED_SOFTMAX_FUSION      1
switch --no-gradient-accumulation-fusion       NO_GRADIENT_ACCUMULATION_FUSION 1
switch --exit-on-missing-checkpoint            EXIT_ON_MISSING_CHECKPOINT    1
flag   --make-vocab-size-divisible-by          MAKE_VOCAB_SIZE_DIVISIBLE_BY  1
flag   --top-k                                 TOP_K                         ""
flag   --top-p                                 TOP_P                         ""
flag   --temperature                           TEMPERATURE                   ""
flag   --seed                                  SEED                          ""

run_distributed 6001 inference.py "$@"
