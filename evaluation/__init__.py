"""Benchmarks and what their scores are worth. Imports weights, the model, its parts and infra; see mvbench.py."""
