"""Prepared data on disk, tokenizers and generated tasks."""
