# Sourced before model.sh: what Llama-2-70B has otherwise than Llama-2-7B.

own NUM_LAYERS 80
own HIDDEN_SIZE 8192
own FFN_HIDDEN_SIZE 28672
own NUM_ATTENTION_HEADS 64
own GROUP_QUERY_ATTENTION 1
own NUM_QUERY_GROUPS 8
