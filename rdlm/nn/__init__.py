"""Layers shared by all families. They know nothing of noise schedules, recurrence, training or caching
policy."""
