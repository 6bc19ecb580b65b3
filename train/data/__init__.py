"""From sources to shards and from shards to batches: sources, prepare, corpus."""

from train.data.corpus import Corpus, Reader, build_corpus

__all__ = ["Corpus", "Reader", "build_corpus"]
