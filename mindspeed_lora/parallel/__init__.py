"""Process groups, collectives outside of autograd, and agreement between ranks on errors."""
