# Sourced before model.sh: what Qwen3-4B has otherwise than Qwen3-8B.

own HIDDEN_SIZE 2560
own FFN_HIDDEN_SIZE 9728
own UNTIE 0
