"""From sources to shards and from shards to batches: sources, prepare, order, corpus."""

from train.data.corpus import Corpus, build_corpus

__all__ = ["Corpus", "build_corpus"]
