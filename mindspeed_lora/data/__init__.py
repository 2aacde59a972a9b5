"""Preparing text as token files, and reading them back as batches."""
