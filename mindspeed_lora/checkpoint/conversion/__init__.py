"""``convert_ckpt.py``: a source, operations on the hub, a target."""
