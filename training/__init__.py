"""What train.py and data.py need besides the paper: annotation index, optimizers, log, resuming, cached features.

Imports weights, the model's parts and infra; only data.py, train.py and the toy import this room.
"""
