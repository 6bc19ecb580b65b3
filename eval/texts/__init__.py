"""Measurements of generated text."""
