# Sourced after a table of models with experts: what DeepSeek-V3 says of its own.

own SPEC "mindspeed_llm.tasks.models.spec.deepseek_spec layer_spec"
own NUM_LAYERS 61
own NUM_LAYER_LIST 15,15,16,15
own HIDDEN_SIZE 7168
own FFN_HIDDEN_SIZE 18432
own NUM_ATTENTION_HEADS 128
own QK_LAYERNORM 1
own MAX_POSITION_EMBEDDINGS 163840
own ROTARY_BASE 10000
own NORM_EPSILON 1e-6
own VOCAB_SIZE 129280
own PADDED_VOCAB_SIZE 129280
own NUM_EXPERTS 256
own MOE_ROUTER_TOPK 8
own MOE_FFN_HIDDEN_SIZE 2048
own N_SHARED_EXPERTS 1
own NORM_TOPK_PROB 1
own MOE_LAYER_FREQ 1
own FIRST_K_DENSE_REPLACE 3
own MOE_TOKEN_DISPATCHER_TYPE alltoall_seq
own CP_TYPE ulysses_cp_algo
own PROMPT_TYPE deepseek3

# Latent attention, YaRN, and the router's groups and bias: no other family of these scripts has them.
switch --multi-latent-attention                        MULTI_LATENT_ATTENTION           1
flag   --q-lora-rank                                   Q_LORA_RANK                      1536
flag   --kv-lora-rank                                  KV_LORA_RANK                     512
flag   --qk-nope-head-dim                              QK_NOPE_HEAD_DIM                 128
flag   --qk-rope-head-dim                              QK_ROPE_HEAD_DIM                 64
flag   --v-head-dim                                    V_HEAD_DIM                       128
flag   --rope-scaling-type                             ROPE_SCALING_TYPE                yarn
flag   --rope-scaling-factor                           ROPE_SCALING_FACTOR              40
flag   --rope-scaling-original-max-position-embeddings ROPE_SCALING_ORIGINAL_MAX_POSITION_EMBEDDINGS 4096
flag   --rope-scaling-beta-fast                        ROPE_SCALING_BETA_FAST           32
flag   --rope-scaling-beta-slow                        ROPE_SCALING_BETA_SLOW           1
flag   --rope-scaling-mscale                           ROPE_SCALING_MSCALE              1.0
flag   --rope-scaling-mscale-all-dim                   ROPE_SCALING_MSCALE_ALL_DIM      1.0
flag   --moe-router-score-function                     MOE_ROUTER_SCORE_FUNCTION        sigmoid
switch --moe-router-enable-expert-bias                 MOE_ROUTER_ENABLE_EXPERT_BIAS    1
flag   --moe-router-num-groups                         MOE_ROUTER_NUM_GROUPS            8
flag   --topk-group                                    TOPK_GROUP                       4
flag   --routed-scaling-factor                         ROUTED_SCALING_FACTOR            2.5
