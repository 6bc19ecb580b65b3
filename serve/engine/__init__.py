"""The engine: one thread that owns the model and steps every request in flight."""
