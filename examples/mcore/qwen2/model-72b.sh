# Sourced before model.sh: what Qwen2-72B has otherwise than Qwen2-7B.

own NUM_LAYERS 80
own HIDDEN_SIZE 8192
own FFN_HIDDEN_SIZE 29568
own NUM_ATTENTION_HEADS 64
own NUM_QUERY_GROUPS 8
# The base model's is 1e-5, the instruct model's 1e-6: the checkpoint tells.
own NORM_EPSILON ""
