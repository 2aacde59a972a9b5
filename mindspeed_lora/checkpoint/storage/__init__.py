"""Bytes of tensors on disk: safetensors and torch.save files, read and written by ranges."""
