"""Architectures only: no loss, no noise level, no loop over K, no cache state."""
