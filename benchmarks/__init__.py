"""Benchmarks against stated targets; run one with `python -m benchmarks.NAME`."""
