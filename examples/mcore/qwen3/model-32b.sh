# Sourced before model.sh: what Qwen3-32B has otherwise than Qwen3-8B.

own NUM_LAYERS 64
own HIDDEN_SIZE 5120
own FFN_HIDDEN_SIZE 25600
own NUM_ATTENTION_HEADS 64
