"""Which layout of a training on so many GPUs fits, and which of those is fastest: ``tools/plan.py``."""
