# Sourced before model.sh: what Mixtral-8x22B has otherwise than Mixtral-8x7B.

own NUM_LAYERS 56
own HIDDEN_SIZE 6144
own FFN_HIDDEN_SIZE 16384
own NUM_ATTENTION_HEADS 48
