# Sourced before model.sh: what Qwen2.5-3B has otherwise than Qwen2.5-7B.

own NUM_LAYERS 36
own HIDDEN_SIZE 2048
own FFN_HIDDEN_SIZE 11008
own NUM_ATTENTION_HEADS 16
own NUM_QUERY_GROUPS 2
own PADDED_VOCAB_SIZE 151936
own UNTIE 0
