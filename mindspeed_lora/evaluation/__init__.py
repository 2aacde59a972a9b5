"""Judging a model on benchmarks: ours, and those of lm-evaluation-harness."""
