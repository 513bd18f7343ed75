"""The official files <-> a checkpoint of ours: nothing left over, nothing missing in silence.

    l16_25m.pth                   UMT-L, the video ViT                              --umt
    bert-base-uncased/            what the Q-Former begins with; its vocab.txt      --bert
    umt_l16_qformer.pth           after stage 1                                     --stage1
    videochat2_7b_stage2.pth      after stage 2                                     --stage2
    videochat2_7b_stage3.pth      after stage 3                                     --stage3
    Vicuna-7B v0, Mistral-7B      the frozen LLM, in Hugging Face layout            --llm

What is imported is of the highest stage that is named; a later file takes the place of what an earlier one brought, as
in the official code, which reads them one over another. Not here: what the tensors are called (official.py), how files
are read (infra/files.py), the LLM's folder (weights/hf_llama.py), our checkpoint (checkpoint.py).

Run:    python -m weights.convert import --preset vicuna-7b --llm vicuna-7b-v0 --umt l16_25m.pth --bert bert-base-uncased
                                 --out runs/vicuna-7b/init
        python -m weights.convert check --ckpt runs/vicuna-7b/init
"""
import argparse
import math
import os
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from infra.files import atomic_file, atomic_folder, check_state_dict, read_tensors, save_tensors
from model import PRESETS, VideoChat2
from tokenizer import WordPiece
from weights import checkpoint
from weights.hf_llama import config_diff, inspect_llm, llm_config, llm_tokenizer
from weights.official_names import BERT, DROPPED, DROPPED_BERT, DROPPED_UMT, OFFICIAL, UMT, to_official, to_ours

BERT_VOCAB = Path(__file__).resolve().parent.parent / "assets" / "bert_vocab.txt"  # bert-base-uncased's

# --------------------------------------------------------------------------------------------------------------- import


@dataclass
class Files:
    """What import is given: paths, or "" for none."""
    llm: str = ""
    umt: str = ""
    bert: str = ""
    stage1: str = ""
    stage2: str = ""
    stage3: str = ""

    @property
    def stage(self):
        """Of what comes out: the highest that is named; 0 begins stage 1."""
        return max((n for n in (1, 2, 3) if getattr(self, f"stage{n}")), default=0)


@dataclass
class Imported:
    """What came out of the files: a checkpoint's parts, and what to say of them."""
    stage: int
    cfg: object
    tensors: dict = field(default_factory=dict)
    llm: dict = None                              # {"path", "fingerprint"}
    lines: list = field(default_factory=list)
    missing: list = field(default_factory=list)   # at stage 0: what will begin anew


def gather(files, cfg, any_llm=False):
    """Reads the official files -> Imported. ValueError names the file and what does not fit.

    cfg: the preset's Config; the LLM's sizes are its folder's. any_llm: also another LLM than the preset's.
    """
    stage = files.stage
    if stage == 0 and not (files.umt and files.bert):
        raise ValueError("to begin stage 1, name --umt and --bert; to import what was trained, --stage1, 2 or 3")
    if stage > 1 and not files.llm:
        raise ValueError(f"stage {stage} needs the frozen LLM, which its file does not hold: name its folder by --llm")
    if files.llm:
        cfg = replace(cfg, llama=checked_llm(files.llm, cfg, any_llm))
    with torch.device("meta"):
        models = {n: VideoChat2(cfg, n).state_dict() for n in (1, 3)}
        own = models.get(max(stage, 1)) or VideoChat2(cfg, stage).state_dict()
    found, llm_weights = Imported(stage, cfg), {}
    for kind, path in sources(files):
        table, drop = tables_of(kind, cfg)
        official = read_bert(path, cfg) if kind == "bert" else read_tensors(path)
        refuse_untied(official, path)
        try:
            ours, without = to_ours(official, table, own, cfg.prompt_style, drop, models[1] | models[3])
            check_state_dict({n: own[n] for n in ours}, ours, path)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        llm_weights |= {n: t for n, t in ours.items() if checkpoint.is_frozen_llm(n)}
        ours = {n: t.float() for n, t in ours.items() if not checkpoint.is_frozen_llm(n)}
        found.lines += said_of(path, official, ours, without, set(ours) & set(found.tensors))
        found.tensors |= ours
    finish(found, own, files, llm_weights)
    return found


def tables_of(kind, cfg):
    """(names, what is dropped) of a file of this kind."""
    behind = "|".join(map(str, range(cfg.vit.depth, 100)))
    unused = (rf"\.blocks\.({behind})\.", "behind the block that VideoChat2 reads")
    return {"umt": (UMT, [*DROPPED_UMT, unused]), "bert": (BERT, DROPPED_BERT)}.get(kind) or (
        OFFICIAL[int(kind.removeprefix("stage"))], DROPPED)


def sources(files):
    """(kind, path) of what holds weights, in the order in which one takes the other's place."""
    kinds = ("umt", "bert", "stage1", "stage2", "stage3") if files.stage == 0 else ("umt", "stage1", "stage2", "stage3")
    return [(kind, getattr(files, kind)) for kind in kinds if getattr(files, kind)]


def finish(found, own, files, llm_weights):
    """Looks whether everything is there, and reads through the LLM."""
    found.missing = [n for n in own if n not in found.tensors and not checkpoint.is_frozen_llm(n)]
    absent = found.missing
    if found.stage == 0:                               # the ViT must be whole; what BERT lacks begins anew
        absent = [n for n in found.missing if n.startswith("vision_encoder.")]
    if absent:
        from_stage1 = " (a stage 2 file lacks the Q-Former's text half: name --stage1, too)" * (
            found.stage > 1 and not files.stage1)
        raise ValueError(f"{len(absent)} tensors are in none of the files: {', '.join(absent[:3])}"
                         f"{', ...' if len(absent) > 3 else ''}{from_stage1}")
    if files.llm:
        names = {n.removeprefix(checkpoint.LLM_PREFIX).replace(".base.", "."): t for n, t in llm_weights.items()}
        llm_tokenizer(files.llm)
        _, mark = inspect_llm(files.llm, names)
        found.llm = {"path": str(Path(files.llm).resolve()), "fingerprint": mark}
        found.lines.append(f"{files.llm}: the frozen LLM, fingerprint {mark}; it stays where it is")


def checked_llm(folder, cfg, any_llm):
    """LlamaConfig of the folder; ValueError if it is not of the LLM that the preset's checkpoints were made with."""
    sizes = llm_config(folder)
    other = [text for name, text in config_diff(sizes, cfg.llama).items() if name != "vocab_size"]
    if other and not any_llm:
        theirs = {"vicuna-7b": "Vicuna-7B v0, made from LLaMA-1", "mistral-7b": "Mistral-7B-Instruct-v0.2"}
        hint = ": so do LLaMA-2 and Vicuna v1.5" if sizes.max_positions == 4096 else ""
        raise ValueError(f"{folder} is another LLM than preset {cfg.preset}'s ({theirs.get(cfg.preset, cfg.preset)}): "
                         f"its config.json says {', '.join(other)}{hint}. Released checkpoints give gibberish with it; "
                         "to train with it from stage 2 on, add --any-llm")
    return sizes


def read_bert(folder, cfg):
    """The weights of a BERT folder under today's names, with a row for [DEC], and query rows like the text's.

    Source: blip2.py, init_Qformer: what is named after _query is copied from BERT, cross-attention begins at random.
    """
    folder = Path(folder)
    files = [folder / name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).is_file()]
    if not files:
        raise FileNotFoundError(f"{folder} holds neither model.safetensors nor pytorch_model.bin of bert-base-uncased")
    tensors = {n.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): t
               for n, t in read_tensors(files[0]).items()}
    if not any(n.startswith("bert.") for n in tensors):                    # a bare BertModel
        tensors = {f"bert.{n}": t for n, t in tensors.items()}
    words = tensors.get("bert.embeddings.word_embeddings.weight")
    if words is not None and len(words) == cfg.qformer.vocab_size - 1:
        generator = torch.Generator().manual_seed(0)
        row = torch.empty(1, words.shape[1]).normal_(std=0.02, generator=generator)
        tensors["bert.embeddings.word_embeddings.weight"] = torch.cat((words.float(), row))
        if "cls.predictions.bias" in tensors:
            tensors["cls.predictions.bias"] = torch.cat((tensors["cls.predictions.bias"].float(), torch.zeros(1)))
        tensors.pop("cls.predictions.decoder.weight", None)                # as long as the embeddings before
        tensors.pop("cls.predictions.decoder.bias", None)
    for name in list(tensors):
        query = re.sub(r"(\.layer\.\d+\.(?:intermediate|output))\.", r"\1_query.", name)
        tensors.setdefault(query, tensors[name].clone())
    return tensors


def refuse_untied(official, path):
    """What is dropped since it is tied must be so."""
    for copy, source in (("qformer.cls.predictions.decoder.weight", "qformer.bert.embeddings.word_embeddings.weight"),
                         ("qformer.cls.predictions.decoder.bias", "qformer.cls.predictions.bias")):
        if copy in official and not official[copy].is_meta and not torch.equal(official[copy], official[source]):
            raise ValueError(f"{path}: {copy} differs from {source}, with which it should be one")


def said_of(path, official, ours, without, again):
    """What became of a file's tensors, in lines."""
    lines = [f"{path}: {len(official)} tensors, {len(ours)} taken"
             + (f", {len(again)} of them in the place of an earlier file's" if again else "")]
    for why in dict.fromkeys(without.values()):
        names = [n for n, reason in without.items() if reason == why]
        lines.append(f"  {len(names):4} dropped: {why} ({names[0]}{', ...' if len(names) > 1 else ''})")
    return lines


def refuse_to_replace(out):
    """An import may take the place of an import, and of nothing else."""
    inside = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if inside and not {"config.json"} <= inside <= {"config.json", "model.safetensors", "vocab.txt"}:
        other = sorted(inside - {"config.json", "model.safetensors", "vocab.txt"})
        raise ValueError(f"{out} holds more than an import ({', '.join(other[:3])}), and would be replaced: name "
                         "another --out")


def import_files(files, cfg, out, any_llm=False):
    """Official files -> a checkpoint folder; prints what became of every file."""
    vocab = Path(files.bert) / "vocab.txt" if files.bert else BERT_VOCAB
    words = WordPiece.load(vocab).vocab_size
    if words != cfg.qformer.vocab_size:
        raise ValueError(f"{vocab} has {words} words, [DEC] included, and the Q-Former {cfg.qformer.vocab_size}: take "
                         "that of bert-base-uncased")
    refuse_to_replace(Path(out))
    found = gather(files, cfg, any_llm)
    print(*found.lines, sep="\n")
    if found.missing:
        parts = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", n).rpartition(".")[0] or n for n in found.missing)
        print(f"in none of the files, so stage 1 begins with them anew: {len(found.missing)} tensors "
              f"({', '.join(parts)})")
    with atomic_folder(out) as folder:
        checkpoint.save_checkpoint(found.tensors, found.stage, found.cfg, folder, vocab, found.llm)
    what = f"a checkpoint of stage {found.stage}" if found.stage else "the beginning of stage 1"
    print(f"written to {out}: {what}")


# ----------------------------------------------------------------------------------------------------- export and check


def export(ckpt, out):
    """A checkpoint folder of stage 1 to 3 -> one .pth file that the official code loads."""
    cfg, found = checkpoint.read_config(ckpt)
    if found["stage"] not in OFFICIAL:
        raise ValueError(f"{ckpt} is of stage {found['stage']}; the official code knows files of stages 1, 2 and 3")
    tensors = to_official(read_tensors(Path(ckpt) / "model.safetensors"), found["stage"], cfg)
    with atomic_file(out) as temporary:
        save_tensors(tensors, temporary)
    size = os.path.getsize(out) / 2**20
    print(f"written to {out}: {len(tensors)} tensors of stage {found['stage']}, {size:,.0f} MiB")
    if found["stage"] == 2:
        print("The Q-Former's text half is not among them, as in the official file: stage 3 takes it from stage 1's.")


def check(ckpt):
    """Prints what a checkpoint folder, or an official file, holds per module; ValueError if something is missing."""
    if not Path(ckpt).exists():
        raise FileNotFoundError(f"{ckpt}: no such checkpoint folder or file")
    if Path(ckpt).is_file():
        tensors = read_tensors(ckpt)
    else:
        cfg, found = checkpoint.read_config(ckpt)
        tensors = read_tensors(Path(ckpt) / "model.safetensors")
        print(f"{ckpt}: preset {cfg.preset}, stage {found['stage']}")
        print_llm(ckpt, found["llm"])
    rows = {}
    for name, t in tensors.items():
        rows.setdefault(module_of(name), []).append(t)
    print(f"  {'module':32} {'tensors':>7} {'parameters':>13}  {'dtype':9} {'norm':>10}")
    for part, some in rows.items():
        norm = sum(t.double().square().sum().item() for t in some) ** 0.5
        dtypes = "/".join(sorted({str(t.dtype).removeprefix("torch.") for t in some}))
        print(f"  {part:32} {len(some):7} {sum(t.numel() for t in some):13,}  {dtypes:9} {norm:10.3f}")
        if not math.isfinite(norm):
            raise ValueError(f"{ckpt}: {part} holds values that are no numbers")
    print(f"  {'all':32} {len(tensors):7} {sum(t.numel() for t in tensors.values()):13,}")
    if not Path(ckpt).is_file() and found["stage"] in OFFICIAL:
        with torch.device("meta"):
            own = VideoChat2(cfg, found["stage"]).state_dict()
        check_state_dict({n: t for n, t in own.items() if not checkpoint.is_frozen_llm(n)}, tensors, ckpt)
        print("whole: every tensor of the stage is there, with the right shape")


def print_llm(ckpt, llm):
    if not llm:
        print("  LLM: none yet")
        return
    try:
        where = os.path.normpath(checkpoint.find_llm(ckpt, llm["path"]))
        print(f"  LLM: {where}, fingerprint {llm['fingerprint']}")
    except FileNotFoundError as error:
        print(f"  LLM: fingerprint {llm['fingerprint']}; {error}")


def module_of(name):
    """The row of check's table that a tensor counts in."""
    if "lora_" in name:
        return "lora"
    if re.match(r"(llama|mistral)_model\.", name):
        return name.split(".")[0]
    parts = name.split(".")
    depth = {"qformer": 3, "vision_encoder": 2, "aligner": 2}.get(parts[0], 1)
    return ".".join(parts[:depth if len(parts) > depth else max(1, len(parts) - 1)])


# --------------------------------------------------------------------------------------------------------- command line


def parse(argv=None):
    p = argparse.ArgumentParser(prog="weights.py", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True, metavar="import|export|check")
    take = commands.add_parser("import", help="official files -> a checkpoint folder",
                               description="Official files -> a checkpoint folder, of the highest stage that is named.")
    take.add_argument("--preset", default="vicuna-7b", help=f"{', '.join(PRESETS)} (default %(default)s)")
    take.add_argument("--llm", default="", help="the frozen LLM's folder: Vicuna-7B v0 (delta applied), or Mistral-7B")
    take.add_argument("--umt", default="", help="l16_25m.pth: the ViT that stage 1 begins with")
    take.add_argument("--bert", default="", help="folder of bert-base-uncased: what the Q-Former begins stage 1 with")
    for stage, file in ((1, "umt_l16_qformer.pth"), (2, "videochat2_7b_stage2.pth"), (3, "videochat2_7b_stage3.pth")):
        take.add_argument(f"--stage{stage}", default="", help=f"{file}: what stage {stage} has trained")
    take.add_argument("--any-llm", action="store_true", help="another LLM than the preset's")
    take.add_argument("--out", required=True, help="the folder to write")
    give = commands.add_parser("export", help="a checkpoint folder -> a file that the official code loads")
    give.add_argument("--ckpt", required=True, help="a checkpoint folder of stage 1, 2 or 3")
    give.add_argument("--out", required=True, help="the .pth file to write")
    look = commands.add_parser("check", help="what is in a checkpoint, per module: tensors, parameters, dtype, norm")
    look.add_argument("--ckpt", required=True, help="a checkpoint folder, or an official file")
    args = p.parse_args(argv)
    if args.command == "import" and args.preset not in PRESETS:
        p.error(f"--preset {args.preset} is unknown; there are {', '.join(PRESETS)}")
    return args


def main(argv=None):
    args = parse(argv)
    if args.command == "import":
        files = Files(args.llm, args.umt, args.bert, args.stage1, args.stage2, args.stage3)
        import_files(files, PRESETS[args.preset](), args.out, args.any_llm)
    elif args.command == "export":
        export(args.ckpt, args.out)
    else:
        check(args.ckpt)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped; nothing was written")
    except (ValueError, OSError) as error:
        print(f"weights.py: {error}", file=sys.stderr)
        sys.exit(2)
