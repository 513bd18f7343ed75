"""Media files, files that are written whole, processes that work together, command lines. Imports nothing of ours."""
