"""Serving: an engine that batches core steps, and the HTTP interface over it."""
