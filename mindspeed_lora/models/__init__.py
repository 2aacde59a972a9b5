"""The GPT model: layer specification over megatron-core, attention, norm, rotary positions, loss, loading."""
