"""Measurements behind docs/results: scripts, not tests. Run from the repository root."""
