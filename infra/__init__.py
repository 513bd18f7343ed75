"""What no paper mentions: files that are written whole, processes that work together, command lines.

Everyone may import this room; it imports nothing of ours.
"""
