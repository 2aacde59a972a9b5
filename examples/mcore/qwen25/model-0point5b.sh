# Sourced before model.sh: what Qwen2.5-0.5B has otherwise than Qwen2.5-7B.

own NUM_LAYERS 24
own HIDDEN_SIZE 896
own FFN_HIDDEN_SIZE 4864
own NUM_ATTENTION_HEADS 14
own NUM_QUERY_GROUPS 2
own PADDED_VOCAB_SIZE 151936
own UNTIE 0
