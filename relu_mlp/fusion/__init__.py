"""`fuse`, which makes the ReLU networks in a model run as one operator each."""
