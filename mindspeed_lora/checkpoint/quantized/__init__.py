"""Quantised weights in files: bitsandbytes' form of a matrix, its values by ranges, and its parts on ranks."""
