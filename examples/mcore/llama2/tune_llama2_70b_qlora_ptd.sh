#!/usr/bin/env bash
# Fine-tunes Llama-2-70B with QLoRA over two tensor-parallel ranks: the frozen linears hold 4 bits a weight.
#
#   CKPT_LOAD_DIR=./model_weights/Llama2-mcore DATA_PATH=./finetune_dataset/alpaca \
#   TOKENIZER_PATH=./model_from_hf/llama-2-70b-hf CKPT_SAVE_DIR=./ckpt/llama-2-70b-qlora \
#       examples/mcore/llama2/tune_llama2_70b_qlora_ptd.sh [more flags]
#
# CKPT_LOAD_DIR is what ckpt_convert_llama2_hf2mcore_qlora.sh wrote, or any other checkpoint: a plain one, Hugging
# Face's too, is quantised while it is read. QUANT_DOUBLE=1 quantises the scales too.
#
# Every line of the table is a flag, the variable that overrides it, and its value (../job.sh tells the rules): for
# example SP=0 and UNTIE=0 leave a switch out, NUM_LAYERS= lets the checkpoint tell, RESUME=auto goes on with the run
# in CKPT_SAVE_DIR, LORA_LOAD=DIR starts from an adapter. The launch: NPROC (or NPUS_PER_NODE) processes on each of
# NNODES machines, NODE_RANK, MASTER_ADDR, MASTER_PORT.

# shellcheck source=../job.sh
source "$(dirname "${BASH_SOURCE[0]}")/../job.sh"

own TP 2

flag   --tensor-model-parallel-size            TP                            2
flag   --pipeline-model-parallel-size          PP                            1
switch --sequence-parallel                     SP                            1
switch --use-mcore-models                      USE_MCORE_MODELS              1
flag   --prompt-type                           PROMPT_TYPE                   llama2
switch --hf-chat-template                      HF_CHAT_TEMPLATE              0
flag   --tokenizer-type                        TOKENIZER_TYPE                PretrainedFromHF
flag   --tokenizer-name-or-path                TOKENIZER_PATH                "your tokenizer path"
flag   --micro-batch-size                      MICRO_BATCH_SIZE              1
flag   --global-batch-size                     GLOBAL_BATCH_SIZE             1
flag   --train-iters                           TRAIN_ITERS                   2000
flag   --lr                                    LR                            1.0e-6
flag   --min-lr                                MIN_LR                        ""
flag   --lr-decay-style                        LR_DECAY_STYLE                cosine
flag   --lr-warmup-fraction                    LR_WARMUP_FRACTION            0.00
flag   --weight-decay                          WEIGHT_DECAY                  0.0
flag   --clip-grad                             CLIP_GRAD                     1.0
switch --swiglu                                SWIGLU                        1
flag   --position-embedding-type               POSITION_EMBEDDING_TYPE       rope
switch --untie-embeddings-and-output-weights   UNTIE                         1
switch --disable-bias-linear                   DISABLE_BIAS_LINEAR           1
switch --add-qkv-bias                          ADD_QKV_BIAS                  0
switch --qk-layernorm                          QK_LAYERNORM                  0
flag   --hidden-dropout                        HIDDEN_DROPOUT                0.0
flag   --normalization                         NORMALIZATION                 RMSNorm
switch --use-flash-attn                        USE_FLASH_ATTN                1
switch --no-masked-softmax-fusion              NO_MASKED_SOFTMAX_FUSION      1
switch --attention-softmax-in-fp32             ATTENTION_SOFTMAX_IN_FP32     1
flag   --init-method-std                       INIT_METHOD_STD               0.01
flag   --initial-loss-scale                    INITIAL_LOSS_SCALE            1
flag   --adam-beta1                            ADAM_BETA1                    0.9
flag   --adam-beta2                            ADAM_BETA2                    0.999
flag   --adam-eps                              ADAM_EPS                      1e-8
switch --no-gradient-accumulation-fusion       NO_GRADIENT_ACCUMULATION_FUSION 1
switch --use-distributed-optimizer             USE_DISTRIBUTED_OPTIMIZER     0
switch --paged-optimizer                       PAGED_OPTIMIZER               0
flag   --recompute-granularity                 RECOMPUTE_GRANULARITY         ""
flag   --recompute-method                      RECOMPUTE_METHOD              ""
flag   --recompute-num-layers                  RECOMPUTE_NUM_LAYERS          ""
switch --no-load-optim                         NO_LOAD_OPTIM                 1
switch --no-load-rng                           NO_LOAD_RNG                   1
switch --no-pad-to-seq-lengths                 NO_PAD_TO_SEQ_LENGTHS         1
flag   --rotary-base                           ROTARY_BASE                   10000
flag   --norm-epsilon                          NORM_EPSILON                  1e-05
flag   --make-vocab-size-divisible-by          MAKE_VOCAB_SIZE_DIVISIBLE_BY  1
flag   --padded-vocab-size                     PADDED_VOCAB_SIZE             32000
flag   --vocab-size                            VOCAB_SIZE                    32000
switch --bf16                                  BF16                          1
switch --fp16                                  FP16                          0
flag   --num-layers                            NUM_LAYERS                    80
flag   --hidden-size                           HIDDEN_SIZE                   8192
flag   --ffn-hidden-size                       FFN_HIDDEN_SIZE               28672
flag   --num-attention-heads                   NUM_ATTENTION_HEADS           64
flag   --kv-channels                           KV_CHANNELS                   ""
flag   --seq-length                            SEQ_LENGTH                    4096
flag   --max-position-embeddings               MAX_POSITION_EMBEDDINGS       4096
switch --use-rotary-position-embeddings        USE_ROTARY_POSITION_EMBEDDINGS 1
switch --group-query-attention                 GROUP_QUERY_ATTENTION         1
flag   --num-query-groups                      NUM_QUERY_GROUPS              8
switch --tokenizer-not-use-fast                TOKENIZER_NOT_USE_FAST        1
flag   --attention-dropout                     ATTENTION_DROPOUT             0.0
flag   --seed                                  SEED                          42
switch --exit-on-missing-checkpoint            EXIT_ON_MISSING_CHECKPOINT    1
switch --finetune                              FINETUNE                      1
flag   --resume                                RESUME                        ""
switch --overwrite                             OVERWRITE                     0
flag   --stage                                 STAGE                         sft
switch --is-instruction-dataset                IS_INSTRUCTION_DATASET        1
flag   --lora-r                                LORA_R                        16
flag   --lora-alpha                            LORA_ALPHA                    32
flag   --lora-dropout                          LORA_DROPOUT                  ""
switch --lora-fusion                           LORA_FUSION                   0
words  --lora-target-modules                   LORA_TARGET_MODULES           "linear_qkv linear_proj linear_fc1 linear_fc2"
flag   --lora-load                             LORA_LOAD                     ""
switch --qlora                                 QLORA                         1
flag   --quant-type                            QUANT_TYPE                    ""
flag   --quant-block-size                      QUANT_BLOCK_SIZE              ""
switch --quant-double                          QUANT_DOUBLE                  0
words  --quant-skip-modules                    QUANT_SKIP_MODULES            ""
switch --qlora-save-dequantize                 QLORA_SAVE_DEQUANTIZE         0
flag   --data-path                             DATA_PATH                     "your data path"
flag   --valid-data-path                       VALID_DATA_PATH               ""
flag   --split                                 SPLIT                         100,0,0
flag   --log-interval                          LOG_INTERVAL                  1
flag   --save-interval                         SAVE_INTERVAL                 2000
flag   --save-total-limit                      SAVE_TOTAL_LIMIT              ""
flag   --eval-interval                         EVAL_INTERVAL                 10000
flag   --eval-iters                            EVAL_ITERS                    0
flag   --load                                  CKPT_LOAD_DIR                 "your model ckpt path"
flag   --save                                  CKPT_SAVE_DIR                 "your model save ckpt path"
switch --log-throughput                        LOG_THROUGHPUT                1
flag   --distributed-backend                   DISTRIBUTED_BACKEND           nccl
flag   --distributed-timeout-minutes           DISTRIBUTED_TIMEOUT_MINUTES   ""

run_distributed 6080 posttrain_gpt.py "$@"
