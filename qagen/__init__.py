"""Annotations of videos become multiple-choice questions and instruction data, as MVBench makes them.

Imports evaluation, prompt.py and infra. The toy world is its first user."""
