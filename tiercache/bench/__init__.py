"""Benchmarks: a model of a given shape, timed against the roofs of the same run, and peers beside it."""
