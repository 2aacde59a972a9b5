# Sourced before model.sh: what Llama-3.1-70B has otherwise than Llama-3.1-8B.

own NUM_LAYERS 80
own HIDDEN_SIZE 8192
own FFN_HIDDEN_SIZE 28672
own NUM_ATTENTION_HEADS 64
