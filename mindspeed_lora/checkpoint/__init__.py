"""Reading and writing checkpoints: one hub of canonical tensors, one file per format around it."""
