"""LoRA on megatron-core's parallel linears: layers, starting values, injection."""
