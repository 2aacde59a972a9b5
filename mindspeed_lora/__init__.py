"""Parameter-efficient fine-tuning of large language models with Megatron-core parallelism."""

__version__ = "0.1.0"
