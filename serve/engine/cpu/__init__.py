"""Inference on CPUs: kernels.cpp, its compiler, and the modules of a model that run on it."""
