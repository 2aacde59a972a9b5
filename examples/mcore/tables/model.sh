# Sourced by the scripts that train, generate and evaluate: the flags that tell layout and model.
#
# Every line is a flag, the variable that overrides it, and its value; a family says its own by `own` (../job.sh).

# shellcheck source=../job.sh
source "$(dirname "${BASH_SOURCE[0]}")/../job.sh"

layout_table() {
    flag   --tensor-model-parallel-size       TP                            1
    flag   --pipeline-model-parallel-size     PP                            1
    flag   --expert-model-parallel-size       EP                            ""
    flag   --expert-tensor-parallel-size      ETP                           ""
    switch --moe-tp-extend-ep                 MOE_TP_EXTEND_EP              0
    flag   --context-parallel-size            CP                            ""
    flag   --context-parallel-algo            CP_TYPE                       ""
    flag   --num-layer-list                   NUM_LAYER_LIST                ""
    flag   --noop-layers                      NOOP_LAYERS                   ""
    flag   --num-layers-per-virtual-pipeline-stage VPP                      ""
    switch --sequence-parallel                SP                            1
}

model_table() {
    switch --use-mcore-models                 USE_MCORE_MODELS              1
    words  --spec                             SPEC                          ""
    flag   --num-layers                       NUM_LAYERS                    ""
    flag   --hidden-size                      HIDDEN_SIZE                   ""
    flag   --ffn-hidden-size                  FFN_HIDDEN_SIZE               ""
    flag   --num-attention-heads              NUM_ATTENTION_HEADS           ""
    switch --group-query-attention            GROUP_QUERY_ATTENTION         0
    flag   --num-query-groups                 NUM_QUERY_GROUPS              ""
    flag   --kv-channels                      KV_CHANNELS                   ""
    switch --qk-layernorm                     QK_LAYERNORM                  0
    flag   --max-position-embeddings          MAX_POSITION_EMBEDDINGS       ""
    flag   --position-embedding-type          POSITION_EMBEDDING_TYPE       rope
    flag   --rotary-base                      ROTARY_BASE                   ""
    flag   --rotary-percent                   ROTARY_PERCENT                ""
    flag   --rope-scaling-type                ROPE_SCALING_TYPE             ""
    flag   --rope-scaling-factor              ROPE_SCALING_FACTOR           ""
    flag   --low-freq-factor                  LOW_FREQ_FACTOR               ""
    flag   --high-freq-factor                 HIGH_FREQ_FACTOR              ""
    flag   --rope-scaling-original-max-position-embeddings ROPE_SCALING_ORIGINAL_MAX_POSITION_EMBEDDINGS ""
    flag   --rope-scaling-beta-fast           ROPE_SCALING_BETA_FAST        ""
    flag   --rope-scaling-beta-slow           ROPE_SCALING_BETA_SLOW        ""
    flag   --rope-scaling-mscale              ROPE_SCALING_MSCALE           ""
    flag   --rope-scaling-mscale-all-dim      ROPE_SCALING_MSCALE_ALL_DIM   ""
    flag   --short-factor                     SHORT_FACTOR                  ""
    flag   --long-factor                      LONG_FACTOR                   ""
    switch --use-glm-rope                     USE_GLM_ROPE                  0
    flag   --sliding-window-size              SLIDING_WINDOW_SIZE           ""
    flag   --interleave-sliding-window        INTERLEAVE_SLIDING_WINDOW     ""
    flag   --query-pre-attn-scalar            QUERY_PRE_ATTN_SCALAR         ""
    flag   --attn-logit-softcapping           ATTN_LOGIT_SOFTCAPPING        ""
    flag   --output-logit-softcapping         OUTPUT_LOGIT_SOFTCAPPING      ""
    switch --input-embeds-norm                INPUT_EMBEDS_NORM             0
    flag   --scale-emb                        SCALE_EMB                     ""
    flag   --scale-depth                      SCALE_DEPTH                   ""
    flag   --dim-model-base                   DIM_MODEL_BASE                ""
    flag   --normalization                    NORMALIZATION                 RMSNorm
    flag   --norm-epsilon                     NORM_EPSILON                  ""
    switch --post-norm                        POST_NORM                     0
    switch --add-rmsnorm-offset               ADD_RMSNORM_OFFSET            0
    switch --swiglu                           SWIGLU                        1
    switch --gelu-tanh                        GELU_TANH                     0
    switch --untie-embeddings-and-output-weights UNTIE                      1
    switch --disable-bias-linear              DISABLE_BIAS_LINEAR           1
    switch --add-qkv-bias                     ADD_QKV_BIAS                  0
    flag   --vocab-size                       VOCAB_SIZE                    ""
    flag   --padded-vocab-size                PADDED_VOCAB_SIZE             ""
    flag   --make-vocab-size-divisible-by     MAKE_VOCAB_SIZE_DIVISIBLE_BY  1
    switch --multi-latent-attention           MULTI_LATENT_ATTENTION        0
    flag   --q-lora-rank                      Q_LORA_RANK                   ""
    flag   --kv-lora-rank                     KV_LORA_RANK                  ""
    flag   --qk-nope-head-dim                 QK_NOPE_HEAD_DIM              ""
    flag   --qk-rope-head-dim                 QK_ROPE_HEAD_DIM              ""
    flag   --v-head-dim                       V_HEAD_DIM                    ""
    flag   --num-experts                      NUM_EXPERTS                   ""
    flag   --moe-router-topk                  MOE_ROUTER_TOPK               ""
    flag   --moe-ffn-hidden-size              MOE_FFN_HIDDEN_SIZE           ""
    flag   --n-shared-experts                 N_SHARED_EXPERTS              ""
    switch --shared-expert-gate               SHARED_EXPERT_GATE            0
    switch --norm-topk-prob                   NORM_TOPK_PROB                0
    flag   --moe-layer-freq                   MOE_LAYER_FREQ                ""
    flag   --first-k-dense-replace            FIRST_K_DENSE_REPLACE         ""
    flag   --moe-router-score-function        MOE_ROUTER_SCORE_FUNCTION     ""
    switch --moe-router-pre-softmax           MOE_ROUTER_PRE_SOFTMAX        0
    switch --moe-router-enable-expert-bias    MOE_ROUTER_ENABLE_EXPERT_BIAS 0
    flag   --moe-router-num-groups            MOE_ROUTER_NUM_GROUPS         ""
    flag   --topk-group                       TOPK_GROUP                    ""
    flag   --routed-scaling-factor            ROUTED_SCALING_FACTOR         ""
    switch --moe-grouped-gemm                 MOE_GROUPED_GEMM              0
    switch --moe-permutation-async-comm       MOE_PERMUTATION_ASYNC_COMM    0
    flag   --moe-token-dispatcher-type        MOE_TOKEN_DISPATCHER_TYPE     ""
    switch --use-flash-attn                   USE_FLASH_ATTN                1
    switch --use-fused-rotary-pos-emb         USE_FUSED_ROTARY_POS_EMB      1
    switch --use-rotary-position-embeddings   USE_ROTARY_POSITION_EMBEDDINGS 1
    switch --use-fused-swiglu                 USE_FUSED_SWIGLU              1
    switch --use-fused-rmsnorm                USE_FUSED_RMSNORM             1
    switch --no-masked-softmax-fusion         NO_MASKED_SOFTMAX_FUSION      1
    switch --attention-softmax-in-fp32        ATTENTION_SOFTMAX_IN_FP32     1
    switch --no-gradient-accumulation-fusion  NO_GRADIENT_ACCUMULATION_FUSION 1
    switch --no-load-optim                    NO_LOAD_OPTIM                 1
    switch --no-load-rng                      NO_LOAD_RNG                   1
    switch --exit-on-missing-checkpoint       EXIT_ON_MISSING_CHECKPOINT    0
    flag   --tokenizer-type                   TOKENIZER_TYPE                PretrainedFromHF
    flag   --tokenizer-name-or-path           TOKENIZER_PATH                "your tokenizer path"
    flag   --tokenizer-model                  TOKENIZER_MODEL               ""
    switch --tokenizer-not-use-fast           TOKENIZER_NOT_USE_FAST        0
    flag   --prompt-type                      PROMPT_TYPE                   ""
    switch --hf-chat-template                 HF_CHAT_TEMPLATE              0
    switch --bf16                             BF16                          1
    switch --fp16                             FP16                          0
    flag   --load                             CKPT_LOAD_DIR                 "your model ckpt path"
    flag   --distributed-backend              DISTRIBUTED_BACKEND           nccl
    flag   --distributed-timeout-minutes      DISTRIBUTED_TIMEOUT_MINUTES   ""
}

# adapter_table: the adapter that generation and evaluation add where LORA_LOAD names one.
adapter_table() {
    if [[ -n ${LORA_LOAD-} ]]; then
        flag   --lora-load                    LORA_LOAD                     ""
        flag   --lora-r                       LORA_R                        ""
        flag   --lora-alpha                   LORA_ALPHA                    ""
        switch --lora-fusion                  LORA_FUSION                   1
        words  --lora-target-modules          LORA_TARGET_MODULES           ""
    fi
    switch --qlora                            QLORA                         0
}
