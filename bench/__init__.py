"""Speed and memory beside transformers and peft, on this machine, and all that one card can tell
(gpu.py); what was measured: results/.

May import everything but the toy; needs requirements-dev.txt. Nothing imports bench.
"""
