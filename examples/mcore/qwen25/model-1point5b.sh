# Sourced before model.sh: what Qwen2.5-1.5B has otherwise than Qwen2.5-7B.

own HIDDEN_SIZE 1536
own FFN_HIDDEN_SIZE 8960
own NUM_ATTENTION_HEADS 12
own NUM_QUERY_GROUPS 2
own PADDED_VOCAB_SIZE 151936
own UNTIE 0
