"""rdlm: recurrent-depth language models, trained in single passes and served with the number of core steps chosen per request."""

__version__ = "0.1.0"
