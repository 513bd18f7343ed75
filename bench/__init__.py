"""Speed and memory beside transformers and peft, on this machine; what was measured: results/bench_cpu.md.

May import everything but the toy; needs requirements-dev.txt. Nothing imports bench.
"""
