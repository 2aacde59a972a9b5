# Sourced before model.sh: what Qwen2.5-14B has otherwise than Qwen2.5-7B.

own NUM_LAYERS 48
own HIDDEN_SIZE 5120
own FFN_HIDDEN_SIZE 13824
own NUM_ATTENTION_HEADS 40
own NUM_QUERY_GROUPS 8
# The base model's is 1e-5, the instruct model's 1e-6: the checkpoint tells.
own NORM_EPSILON ""
