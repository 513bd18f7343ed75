"""Annotations of videos to multiple-choice questions and instruction data: the way from static to dynamic tasks.

Imports evaluation, prompt.py and infra. The toy world is its first user.
"""
