"""From a checkpoint into the modules of a rank."""
