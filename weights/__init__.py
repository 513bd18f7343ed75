"""Weights on disk: our checkpoints, folders of LLMs, the official files and their names, 8-bit weights.

Imports the model, its parts and infra. Training, evaluation and chat load their models through this room.
"""
