"""Checkpoints of other formats: read into ours, written from ours. Knows files and names; runs no model."""
