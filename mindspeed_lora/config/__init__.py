"""Dataclasses, one per concern; the command-line parser is made from their fields."""
