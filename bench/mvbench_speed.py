"""MVBench questions a second: mvbench.py in batches, beside one question at a time with our LLM and with transformers'.

The same weights and questions; loading the model is not counted. transformers' LLaMA with peft's LoRA is what the
official code runs on. Options are those of mvbench.py. Not here: several processes (mvbench.py prints their rate).

    python -m bench.mvbench_speed --ckpt runs/toy/stage3 --limit 10
"""
import io
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import mvbench
from bench.reference import LlamaTwin
from evaluation.predictions import read_rows
from evaluation.tasks import load_questions
from infra.cli import run
from infra.files import read_json
from weights.checkpoint import load_from_args

def ask_one_by_one(model, qformer_tok, llm_tok, questions, protocol):
    """-> answers, seconds. The first answer is given twice: what is slower only at first is not counted."""
    mvbench.answer_one(model, qformer_tok, llm_tok, questions[0], protocol)
    start = time.perf_counter()
    answers = [mvbench.answer_one(model, qformer_tok, llm_tok, q, protocol) for q in questions]
    return answers, time.perf_counter() - start

def main(argv=None):
    # mvbench.py, with its answers in the benchmark's order; it has to merge LoRA, and so loads a model of its own
    argv = sys.argv[1:] if argv is None else argv
    args = mvbench.parse(argv)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        mvbench.main([*argv, "--out", folder])
        (predictions,), (summary,) = (list(Path(folder).rglob(name)) for name in ("predictions.jsonl", "summary.json"))
        rows, seconds = read_rows(predictions).values(), read_json(summary)["seconds"]
    batched = seconds["in all"] - seconds["loading the model"]
    print(f"{len(rows)} questions; mvbench.py: {len(rows) / batched:.1f} questions/s")

    # one question at a time
    questions = [q for q in load_questions(args.data, limit=args.limit) if q["media"]]
    model, qformer_tok, llm_tok, autocast = load_from_args(args)
    llms = {"our LLM": model.llama_model, "transformers and peft": LlamaTwin(model)}
    for name, model.llama_model in llms.items():               # each LLM in turn becomes the model's
        with autocast:
            answers, seconds = ask_one_by_one(model, qformer_tok, llm_tok, questions, args.protocol)
        # rows has the answers of the batched run, to the same questions in the same order
        differ = sum(answer != row["prediction"] for answer, row in zip(answers, rows, strict=True))
        print(f"answer_one, {name}: {len(questions) / seconds:.1f} questions/s; mvbench.py is "
              f"{seconds / batched:.1f} times as fast, {differ} answers differ", flush=True)

if __name__ == "__main__":
    run(main, "bench.mvbench_speed")
