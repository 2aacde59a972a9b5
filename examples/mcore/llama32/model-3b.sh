# Sourced before model.sh: what Llama-3.2-3B has otherwise than Llama-3.2-1B.

own NUM_LAYERS 28
own HIDDEN_SIZE 3072
own NUM_ATTENTION_HEADS 24
