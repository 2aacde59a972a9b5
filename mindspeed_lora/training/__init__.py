"""Training: plan, step, optimizer, loop, saving and resuming, and what the user sees of it."""
