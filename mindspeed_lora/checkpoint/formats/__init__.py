"""One file per checkpoint format around the hub, reading or writing."""
