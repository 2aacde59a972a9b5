# Sourced before model.sh: what Qwen3-1.7B has otherwise than Qwen3-8B.

own NUM_LAYERS 28
own HIDDEN_SIZE 2048
own FFN_HIDDEN_SIZE 6144
own NUM_ATTENTION_HEADS 16
own UNTIE 0
