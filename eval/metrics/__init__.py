"""One file a metric: `rdlm eval NAME` is the class in NAME.py."""
