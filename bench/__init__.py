"""Speed and memory beside transformers and peft, on the machine at hand.

May import everything but the toy; needs requirements-dev.txt. Nothing imports bench.
"""
