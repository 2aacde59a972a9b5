"""What several test folders need: a pool of processes, tiny models and rows, the PEFT reference."""
