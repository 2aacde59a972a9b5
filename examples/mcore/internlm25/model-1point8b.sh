# Sourced before model.sh: what InternLM2.5-1.8B has otherwise than InternLM2.5-7B.

own NUM_LAYERS 24
own HIDDEN_SIZE 2048
own FFN_HIDDEN_SIZE 8192
own NUM_ATTENTION_HEADS 16
