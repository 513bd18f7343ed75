"""Benchmarks and what their scores are worth: tasks, protocol, engine, predictions, scorers, statistics, reports.

Imports weights, the model, its parts and infra; mvbench.py is its command, and qagen writes files in its layout.
"""
