"""What the benchmarks share: the setting, the sides that are compared, their processes, profile and report."""
