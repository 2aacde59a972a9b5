"""Adapter folders in PEFT's form: configuration, description on a model, values by canonical name."""
