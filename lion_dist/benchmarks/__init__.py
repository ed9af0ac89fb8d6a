"""Measurements, each run by ``python -m lion_dist.benchmarks.NAME``."""
