# Sourced after a table: what Qwen3-30B-A3B says of its own.

own SPEC "mindspeed_llm.tasks.models.spec.qwen3_spec layer_spec"
own NUM_LAYERS 48
own HIDDEN_SIZE 2048
own FFN_HIDDEN_SIZE 6144
own NUM_ATTENTION_HEADS 32
own GROUP_QUERY_ATTENTION 1
own NUM_QUERY_GROUPS 4
own KV_CHANNELS 128
own QK_LAYERNORM 1
own MAX_POSITION_EMBEDDINGS 4096
own ROTARY_BASE 1000000
own PADDED_VOCAB_SIZE 151936
own NUM_EXPERTS 128
own MOE_ROUTER_TOPK 8
own MOE_FFN_HIDDEN_SIZE 768
own NORM_TOPK_PROB 1
own MOE_LAYER_FREQ -1
own FIRST_K_DENSE_REPLACE -1
own MOE_TOKEN_DISPATCHER_TYPE alltoall_seq
own TOKENIZER_NOT_USE_FAST 1
own PROMPT_TYPE qwen3

# shellcheck source=../tables/experts.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/experts.sh"
