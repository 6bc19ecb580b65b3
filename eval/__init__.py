"""Measurements of a checkpoint."""
