"""Generation with a key/value cache over tensor- and pipeline-parallel ranks, and chat."""
