"""Benchmarks and what their numbers are worth: tasks, the batched engine, scorers, statistics, predictions, reports.

Imports weights, the model, its parts and infra; mvbench.py is its command, and qagen writes files in its layout.
"""
