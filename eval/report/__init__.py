"""The report over several results."""
