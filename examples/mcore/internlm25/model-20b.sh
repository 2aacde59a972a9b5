# Sourced before model.sh: what InternLM2.5-20B has otherwise than InternLM2.5-7B.

own NUM_LAYERS 48
own HIDDEN_SIZE 6144
own FFN_HIDDEN_SIZE 16384
own NUM_ATTENTION_HEADS 48
own ROTARY_BASE 50000000
