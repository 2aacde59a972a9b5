# Sourced before model.sh: what Qwen3-0.6B has otherwise than Qwen3-8B.

own NUM_LAYERS 28
own HIDDEN_SIZE 1024
own FFN_HIDDEN_SIZE 3072
own NUM_ATTENTION_HEADS 16
own UNTIE 0
