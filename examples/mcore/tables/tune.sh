# Sourced by the tuning scripts: the flags of a LoRA job, and its start.
#
# NPROC (or NPUS_PER_NODE) processes on each of NNODES machines; TP x PP, and EP x ETP x PP, divide their number.
# What the checkpoint tells may be left out: NUM_LAYERS= HIDDEN_SIZE= … RESUME=auto goes on with the run in
# CKPT_SAVE_DIR, LORA_LOAD=DIR starts from an adapter.

# shellcheck source=model.sh
source "$(dirname "${BASH_SOURCE[0]}")/model.sh"

lora_table() {
    flag   --lora-r                           LORA_R                        8
    flag   --lora-alpha                       LORA_ALPHA                    16
    flag   --lora-dropout                     LORA_DROPOUT                  ""
    switch --lora-fusion                      LORA_FUSION                   1
    words  --lora-target-modules              LORA_TARGET_MODULES           "linear_qkv linear_proj linear_fc1 linear_fc2"
    switch --lora-moe-shared                  LORA_MOE_SHARED               0
    flag   --lora-load                        LORA_LOAD                     ""
    switch --qlora                            QLORA                         0
    flag   --quant-type                       QUANT_TYPE                    ""
    flag   --quant-block-size                 QUANT_BLOCK_SIZE              ""
    switch --quant-double                     QUANT_DOUBLE                  0
    words  --quant-skip-modules               QUANT_SKIP_MODULES            ""
    switch --qlora-save-dequantize            QLORA_SAVE_DEQUANTIZE         0
}

training_table() {
    switch --finetune                         FINETUNE                      1
    flag   --resume                           RESUME                        ""
    switch --overwrite                        OVERWRITE                     0
    flag   --stage                            STAGE                         sft
    switch --is-instruction-dataset           IS_INSTRUCTION_DATASET        1
    flag   --data-path                        DATA_PATH                     "your data path"
    flag   --valid-data-path                  VALID_DATA_PATH               ""
    flag   --split                            SPLIT                         100,0,0
    switch --padded-samples                   PADDED_SAMPLES                0
    switch --neat-pack                        NEAT_PACK                     0
    switch --reset-attention-mask             RESET_ATTENTION_MASK          0
    switch --no-shared-storage                NO_SHARED_STORAGE             0
    switch --no-pad-to-seq-lengths            NO_PAD_TO_SEQ_LENGTHS         1
    flag   --seq-length                       SEQ_LENGTH                    4096
    flag   --micro-batch-size                 MICRO_BATCH_SIZE              1
    flag   --global-batch-size                GLOBAL_BATCH_SIZE             8
    flag   --train-iters                      TRAIN_ITERS                   2000
    flag   --lr                               LR                            1e-5
    flag   --min-lr                           MIN_LR                        ""
    flag   --lr-decay-style                   LR_DECAY_STYLE                cosine
    flag   --lr-decay-iters                   LR_DECAY_ITERS                ""
    flag   --lr-warmup-fraction               LR_WARMUP_FRACTION            ""
    flag   --lr-warmup-iters                  LR_WARMUP_ITERS               ""
    flag   --weight-decay                     WEIGHT_DECAY                  1e-1
    flag   --clip-grad                        CLIP_GRAD                     1.0
    flag   --adam-beta1                       ADAM_BETA1                    0.9
    flag   --adam-beta2                       ADAM_BETA2                    0.95
    flag   --adam-eps                         ADAM_EPS                      ""
    flag   --attention-dropout                ATTENTION_DROPOUT             0.0
    flag   --hidden-dropout                   HIDDEN_DROPOUT                0.0
    flag   --init-method-std                  INIT_METHOD_STD               0.01
    flag   --initial-loss-scale               INITIAL_LOSS_SCALE            ""
    flag   --seed                             SEED                          ""
    switch --moe-alltoall-overlap-comm        MOE_ALLTOALL_OVERLAP_COMM     0
    flag   --moe-zero-memory                  MOE_ZERO_MEMORY               ""
    flag   --moe-router-load-balancing-type   MOE_ROUTER_LOAD_BALANCING_TYPE ""
    flag   --moe-aux-loss-coeff               MOE_AUX_LOSS_COEFF            ""
    switch --seq-aux                          SEQ_AUX                       0
    switch --use-distributed-optimizer        USE_DISTRIBUTED_OPTIMIZER     1
    switch --paged-optimizer                  PAGED_OPTIMIZER               0
    switch --overlap-grad-reduce              OVERLAP_GRAD_REDUCE           0
    switch --overlap-param-gather             OVERLAP_PARAM_GATHER          0
    flag   --recompute-granularity            RECOMPUTE_GRANULARITY         ""
    flag   --recompute-method                 RECOMPUTE_METHOD              ""
    flag   --recompute-num-layers             RECOMPUTE_NUM_LAYERS          ""
    switch --no-check-for-nan-in-loss-and-grad NO_CHECK_FOR_NAN_IN_LOSS_AND_GRAD 0
    flag   --num-workers                      NUM_WORKERS                   ""
    flag   --log-interval                     LOG_INTERVAL                  1
    switch --log-throughput                   LOG_THROUGHPUT                1
    flag   --save                             CKPT_SAVE_DIR                 "your model save ckpt path"
    flag   --save-interval                    SAVE_INTERVAL                 2000
    flag   --save-total-limit                 SAVE_TOTAL_LIMIT              ""
    switch --no-save-optim                    NO_SAVE_OPTIM                 0
    switch --no-save-rng                      NO_SAVE_RNG                   0
    flag   --eval-interval                    EVAL_INTERVAL                 2000
    flag   --eval-iters                       EVAL_ITERS                    0
}

# tune DEFAULT_PORT ARGUMENT ...: the job.
tune() {
    layout_table
    model_table
    lora_table
    training_table
    run_distributed "$1" posttrain_gpt.py "${@:2}"
}
