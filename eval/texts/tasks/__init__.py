"""Task definitions for lm-eval that it does not have itself."""
