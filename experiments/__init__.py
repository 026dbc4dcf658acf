"""Benchmarks against stated targets; run one with `python -m experiments.NAME`."""
