"""Training under DeepSpeed: the one batch loop, its data and its command line."""
