"""Weights on disk: our checkpoints, LLM folders, official files, 8-bit weights. Imports the model, its parts, infra."""
