# Sourced after a table: what Mixtral-8x7B says of its own.

own NUM_LAYERS 32
own HIDDEN_SIZE 4096
own FFN_HIDDEN_SIZE 14336
own NUM_ATTENTION_HEADS 32
own GROUP_QUERY_ATTENTION 1
own NUM_QUERY_GROUPS 8
own MAX_POSITION_EMBEDDINGS 32768
own ROTARY_BASE 1000000
own VOCAB_SIZE 32000
own NUM_EXPERTS 8
# Published are --moe-router-topk 1 and --moe-router-pre-softmax: one expert a token, with a weight below 1. The
# checkpoint's config.json says two, whose weights sum to 1; for other values its experts were not trained.
own MOE_ROUTER_TOPK 2
own PROMPT_TYPE mixtral

# shellcheck source=../tables/experts.sh
source "$(dirname "${BASH_SOURCE[0]}")/../tables/experts.sh"
