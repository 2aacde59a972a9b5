"""Quantised frozen weights: bitsandbytes' numbers on every Hugging Face matrix, shards, and products."""
