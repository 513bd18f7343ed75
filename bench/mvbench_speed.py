"""MVBench questions a second: mvbench.py in batches, beside one question at a time with our LLM and with transformers'.

The same weights and questions; loading the model is not counted. transformers' LLaMA with peft's LoRA is what the
official code runs on. Options are those of mvbench.py. Not here: several processes (mvbench.py prints their rate).

    python -m bench.mvbench_speed --ckpt runs/toy/stage3 --limit 10
"""
import io
import json
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import mvbench
from bench.reference import LlamaTwin
from evaluation.tasks import load_questions
from infra.cli import run
from infra.files import read_json
from weights.checkpoint import load_from_args

def batched(argv):
    """mvbench.py with these options -> its answers in the benchmark's order, and seconds."""
    with tempfile.TemporaryDirectory() as folder:
        with redirect_stdout(io.StringIO()):
            mvbench.main([*argv, "--out", folder])
        (predictions,), (summary,) = (list(Path(folder).rglob(name)) for name in ("predictions.jsonl", "summary.json"))
        answers = [json.loads(line)["prediction"] for line in predictions.read_text().splitlines()]
        seconds = read_json(summary)["seconds"]
    return answers, seconds["in all"] - seconds["loading the model"]

def main(argv=None):
    # the model is loaded once for both LLMs; mvbench.py, which has to merge LoRA, loads its own
    argv = sys.argv[1:] if argv is None else argv
    args = mvbench.parse(argv)
    questions = [q for q in load_questions(args.data, limit=args.limit) if q["media"]]
    model, qformer_tok, llm_tok, autocast = load_from_args(args)
    llms = {"our LLM": model.llama_model, "transformers and peft": LlamaTwin(model)}
    batched_answers, batched_seconds = batched(argv)
    print(f"{len(questions)} questions; mvbench.py: {len(questions) / batched_seconds:.1f} questions/s")

    # the first answer, which is slower, is not counted
    for name, model.llama_model in llms.items():
        with autocast:
            mvbench.answer_one(model, qformer_tok, llm_tok, questions[0], args.protocol)
            start = time.perf_counter()
            answers = [mvbench.answer_one(model, qformer_tok, llm_tok, q, args.protocol) for q in questions]
        seconds = time.perf_counter() - start
        differ = sum(a != b for a, b in zip(answers, batched_answers, strict=True))
        print(f"answer_one, {name}: {len(questions) / seconds:.1f} questions/s; mvbench.py is "
              f"{seconds / batched_seconds:.1f} times as fast, {differ} answers differ", flush=True)

if __name__ == "__main__":
    run(main, "bench.mvbench_speed")
