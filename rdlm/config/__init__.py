"""Configs of a checkpoint, as frozen pydantic models."""
