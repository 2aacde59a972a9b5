# Sourced before model.sh: what Qwen3-14B has otherwise than Qwen3-8B.

own NUM_LAYERS 40
own HIDDEN_SIZE 5120
own FFN_HIDDEN_SIZE 17408
own NUM_ATTENTION_HEADS 40
