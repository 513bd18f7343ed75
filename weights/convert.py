"""The official files <-> our checkpoints: every tensor is accounted for, none is skipped in silence.

OfficialFiles lists what can be imported. The result is a checkpoint of the highest stage named, or what stage 1 starts
from (--umt and --bert alone). Tensors of a later file replace those of an earlier one, as in the official code.
Not here: the tensors' names (official_names.py), the LLM's folder (hf_llama.py), our checkpoints (checkpoint.py).

    python -m weights.convert import --preset vicuna-7b --llm vicuna-7b-v0 --umt l16_25m.pth --bert bert-base-uncased \\
                                     --out runs/vicuna-7b/init
    python -m weights.convert check --ckpt runs/vicuna-7b/init
"""
import argparse
import math
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from infra.cli import option, run
from infra.files import atomic_file, atomic_folder, check_state_dict, read_tensors, save_tensors
from model import PRESETS, VideoChat2
from qformer import VTM_TEXT_CLS
from tokenizer import WordPiece
from weights.checkpoint import LLM_PREFIX, is_frozen_llm, read_config, save_checkpoint
from weights.hf_llama import config_diff, inspect_llm, llm_config, llm_tokenizer
from weights.official_names import OFFICIAL, TABLES, TIED, from_official, to_official

BERT_VOCAB = Path(__file__).resolve().parent.parent / "assets" / "bert_vocab.txt"  # bert-base-uncased's
MODULE = r"qformer\.\w+\.\w+|(vision_encoder|aligner)\.\w+|\w+"  # the first part of a name, as check counts them

@dataclass
class OfficialFiles:
    """What to import: paths, or "" for none."""
    llm: str = option("", "folder of the frozen LLM: Vicuna-7B v0 (delta applied), or Mistral-7B")
    umt: str = option("", "l16_25m.pth: UMT-L, the ViT that stage 1 starts from")
    bert: str = option("", "folder of bert-base-uncased: the Q-Former that stage 1 starts from")
    stage1: str = option("", "umt_l16_qformer.pth: what stage 1 trained")
    stage2: str = option("", "videochat2_7b_stage2.pth: what stage 2 trained")
    stage3: str = option("", "videochat2_7b_stage3.pth: what stage 3 trained")

    @property
    def stage(self):
        """Stage of the imported checkpoint: the highest that is named; 0 is what stage 1 starts from."""
        return max((n for n in (1, 2, 3) if getattr(self, f"stage{n}")), default=0)

def read_bert(folder, cfg):
    """A BERT folder -> {BERT's name: tensor}, with a row for [DEC], and with query layers copied from the text's.
    Source: blip2.py, init_Qformer: layers named _query are copied from BERT, cross-attention starts at random."""
    path = Path(folder) / "model.safetensors"
    tensors = read_tensors(path if path.is_file() else path.with_name("pytorch_model.bin"))
    tensors = {n.replace(".gamma", ".weight").replace(".beta", ".bias"): t for n, t in tensors.items()}  # old spellings
    if not any(n.startswith("bert.") for n in tensors):                    # saved without its pretraining heads
        tensors = {f"bert.{n}": t for n, t in tensors.items()}

    # [DEC] is one word more than BERT has
    words, bias = "bert.embeddings.word_embeddings.weight", "cls.predictions.bias"
    if words in tensors and len(tensors[words]) == cfg.qformer.vocab_size - 1:
        row = torch.empty(1, tensors[words].shape[1]).normal_(std=0.02, generator=torch.Generator().manual_seed(0))
        tensors[words] = torch.cat((tensors[words].float(), row))
        if bias in tensors:
            tensors[bias] = torch.cat((tensors[bias].float(), torch.zeros(1)))

    return copy_text_to_query(tensors)

def copy_text_to_query(tensors):
    """The text's feed-forward layers are also the queries' at first: "layer.3.output." is "layer.3.output_query."."""
    for name in list(tensors):
        query = re.sub(r"(\.layer\.\d+\.(?:intermediate|output))\.", r"\1_query.", name)
        tensors.setdefault(query, tensors[name].clone())
    return tensors

def read_official(kind, path, cfg, expected, other_names):
    """Reads one file -> {our name: tensor}; prints what was dropped and why. ValueError names what does not match."""
    table, drop_rules = TABLES[kind]
    if kind == "umt":                                          # VideoChat2 leaves out UMT's last block
        used = "|".join(map(str, range(cfg.vit.depth)))
        drop_rules = [*drop_rules, (rf"\.blocks\.(?!({used})\.)", "after the last block that VideoChat2 uses")]
    official = read_bert(path, cfg) if kind == "bert" else read_tensors(path)

    # tied copies are dropped, so they must be copies
    for copy, source in TIED.items():
        if copy in official and not torch.equal(official[copy], official[source]):
            raise ValueError(f"{path}: {copy} differs from {source}, to which it should be tied")

    ours, dropped = from_official(official, path, table, expected, cfg.prompt_style, drop_rules, other_names)
    # stage 1's criterion is not in its file, but decides the width of its matching head
    head, E = "aligner.itm_head.weight", cfg.qformer.width
    if head in ours and {ours[head].shape, expected[head].shape} == {(2, E), (2, 2 * E)}:
        choice = "cat" if ours[head].shape == (2, 2 * E) else "add (if trained with vtm_add_text_cls) or none"
        raise ValueError(f"{path}: itm_head.weight is {tuple(ours[head].shape)}: add --vtm-text-cls {choice}")
    check_state_dict({n: expected[n] for n in ours}, ours, path)

    # the report: how many tensors were used, and for each reason how many were not
    print(f"{path}: {len(official)} tensors, {len(ours)} imported")
    for reason in dict.fromkeys(dropped.values()):
        names = [n for n, why in dropped.items() if why == reason]
        print(f"  {len(names):4} dropped: {reason} ({names[0]})")
    return ours

def collect(files, cfg, any_llm=False):
    """Reads OfficialFiles -> (Config with the sizes of the LLM's folder, {our name: tensor}, {"path", "fingerprint"} of
    the LLM or None, names that are missing, which only stage 0 may have). ValueError names what does not match."""
    stage = files.stage
    if stage == 0 and not (files.umt and files.bert):
        raise ValueError("to start stage 1, name --umt and --bert; to import trained weights, --stage1, 2 or 3")
    if stage > 1 and not files.llm:
        raise ValueError(f"stage {stage} needs the frozen LLM, which is not in its file: name its folder by --llm")

    # the LLM may differ from the preset's in the size of its vocabulary alone
    if files.llm:
        preset, cfg = cfg, replace(cfg, llama=llm_config(files.llm))
        differences = [text for field, text in config_diff(cfg.llama, preset.llama).items() if field != "vocab_size"]
        if differences and not any_llm:
            hint = " (as LLaMA-2 and Vicuna v1.5 have it)" if cfg.llama.max_positions == 4096 else ""
            raise ValueError(f"{files.llm} is another LLM than preset {cfg.preset}'s (Vicuna-7B v0 from LLaMA-1, or "
                             f"Mistral-7B-Instruct-v0.2): {', '.join(differences)}{hint}. Released checkpoints give "
                             "gibberish with it; to train with it from stage 2 on, add --any-llm")

    # later files replace tensors of earlier ones; BERT is only a start
    with torch.device("meta"):
        models = {n: VideoChat2(cfg, n).state_dict() for n in (1, 2, 3)}
    expected, tensors = models[max(stage, 1)], {}
    for kind in TABLES:
        path = getattr(files, kind)
        if path and not (kind == "bert" and stage > 0):
            tensors |= read_official(kind, path, cfg, expected, models[1] | models[3])
    llm_weights = {n.removeprefix(LLM_PREFIX).replace(".base.", "."): tensors.pop(n)
                   for n in list(tensors) if is_frozen_llm(n)}

    # a checkpoint must be complete; where stage 1 starts, the ViT must be, and the rest is initialised
    missing = [n for n in expected if n not in tensors and not is_frozen_llm(n)]
    if absent := [n for n in missing if stage > 0 or n.startswith("vision_encoder.")]:
        hint = "; a stage 2 file lacks the Q-Former's text half: name --stage1, too" * (stage > 1 and not files.stage1)
        raise ValueError(f"{len(absent)} tensors are in none of the files: {', '.join(absent[:3])}{hint}")

    # the LLM stays where it is; where official files hold its weights, too, they must be the folder's
    llm = None
    if files.llm:
        llm_tokenizer(files.llm)
        llm = {"path": str(Path(files.llm).resolve()), "fingerprint": inspect_llm(files.llm, llm_weights)[1]}
        print(f"{files.llm}: the frozen LLM, fingerprint {llm['fingerprint']}; it stays where it is")
    return cfg, {n: t.float() for n, t in tensors.items()}, llm, missing

def import_files(files, cfg, out, any_llm=False):
    """OfficialFiles -> a checkpoint folder; prints what became of every file. cfg: the preset's Config."""
    # what can be refused before gigabytes are read: a vocabulary of another size, a folder with other things in it
    out, vocab = Path(out), Path(files.bert) / "vocab.txt" if files.bert else BERT_VOCAB
    if (n_words := WordPiece.load(vocab).vocab_size) != cfg.qformer.vocab_size:
        raise ValueError(f"{vocab} has {n_words} words with [DEC], not {cfg.qformer.vocab_size} as bert-base-uncased's")
    present = {path.name for path in out.iterdir()} if out.is_dir() else set()
    other = sorted(present - {"config.json", "model.safetensors", "vocab.txt"})
    if other or present and "config.json" not in present:
        raise ValueError(f"{out} holds more than an import ({', '.join(other[:3])}), and would be replaced: name "
                         "another --out")

    cfg, tensors, llm, missing = collect(files, cfg, any_llm)
    if missing:
        layers = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", n).rpartition(".")[0] or n for n in missing)
        print(f"in none of the files, so stage 1 initialises them: {len(missing)} tensors ({', '.join(layers)})")
    with atomic_folder(out) as folder:
        save_checkpoint(tensors, files.stage, cfg, folder, vocab, llm)
    print(f"written to {out}: {f'a checkpoint of stage {files.stage}' if files.stage else 'what stage 1 starts from'}")

def export(ckpt, out):
    """A checkpoint folder -> a .pth file that the official code loads, in stage 2 without the Q-Former's text half."""
    cfg, record = read_config(ckpt)
    stage = record["stage"]
    if stage not in OFFICIAL:
        raise ValueError(f"{ckpt} is of stage {stage}; the official code has files of stages 1, 2 and 3")
    # a flat dict, as umt_l16_qformer.pth has to be
    tensors = to_official(read_tensors(Path(ckpt) / "model.safetensors"), stage, cfg)
    with atomic_file(out) as temporary:
        save_tensors(tensors, temporary)
    print(f"written to {out}: {len(tensors)} tensors of stage {stage}, {Path(out).stat().st_size / 2**20:,.0f} MiB")

def check(ckpt):
    """Prints what a checkpoint folder, or an official file, holds per module; ValueError if something is missing."""
    ckpt, stage = Path(ckpt), None                             # an official file has no config that names its stage
    if ckpt.is_dir():
        cfg, record = read_config(ckpt)
        stage, llm = record["stage"], record["llm"]
        print(f"{ckpt}: preset {cfg.preset}, stage {stage}")
        print(f"  LLM: {llm['path']}, fingerprint {llm['fingerprint']}" if llm else "  LLM: none yet",
              "(not there; name its folder by --llm)" if llm and not (ckpt / llm["path"]).is_dir() else "")
    tensors = read_tensors(ckpt / "model.safetensors" if ckpt.is_dir() else ckpt)

    # one row per module
    modules = {}
    for name, t in tensors.items():
        modules.setdefault("lora" if "lora_" in name else re.match(MODULE, name)[0], []).append(t)
    print(f"  {'module':32} {'tensors':>7} {'parameters':>13}  {'dtype':9} {'norm':>10}")
    for module, group in modules.items():
        norm = sum(t.double().square().sum().item() for t in group) ** 0.5
        dtypes = "/".join(sorted({str(t.dtype).removeprefix("torch.") for t in group}))
        print(f"  {module:32} {len(group):7} {sum(t.numel() for t in group):13,}  {dtypes:9} {norm:10.3f}")
        if not math.isfinite(norm):
            raise ValueError(f"{ckpt}: {module} holds NaN or infinite values")
    print(f"  {'all':32} {len(tensors):7} {sum(t.numel() for t in tensors.values()):13,}")

    # a checkpoint of stage 0 has what stage 1 starts from, which is less than a model
    if stage in OFFICIAL:
        with torch.device("meta"):
            expected = VideoChat2(cfg, stage).state_dict()
        check_state_dict({n: t for n, t in expected.items() if not is_frozen_llm(n)}, tensors, ckpt)
        print("complete: every tensor of the stage is there, with the right shape")

def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m weights.convert", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="import|export|check")

    p = commands.add_parser("import", help="official files -> a checkpoint folder of the highest stage that is named")
    p.add_argument("--preset", choices=tuple(PRESETS), default="vicuna-7b", help="(default %(default)s)")
    for f in fields(OfficialFiles):
        p.add_argument(f"--{f.name}", default="", help=f.metadata["help"])
    p.add_argument("--vtm-text-cls", choices=VTM_TEXT_CLS, default="cat",
                   help="how --stage1 was trained: vtm_cat_text_cls, vtm_add_text_cls or neither (default %(default)s)")
    p.add_argument("--any-llm", action="store_true", help="accept another LLM than the preset's")
    p.add_argument("--out", required=True, help="the folder to write")

    p = commands.add_parser("export", help="a checkpoint folder -> a file that the official code loads")
    p.add_argument("--ckpt", required=True, help="a checkpoint folder of stage 1, 2 or 3")
    p.add_argument("--out", required=True, help="the .pth file to write")
    p = commands.add_parser("check", help="what a checkpoint holds, per module: tensors, parameters, dtype, norm")
    p.add_argument("--ckpt", required=True, help="a checkpoint folder, or an official file")

    args = parser.parse_args(argv)
    if args.command == "import":
        files = OfficialFiles(**{f.name: getattr(args, f.name) for f in fields(OfficialFiles)})
        cfg = replace(PRESETS[args.preset](), vtm_text_cls=args.vtm_text_cls)
        import_files(files, cfg, args.out, args.any_llm)
    elif args.command == "export":
        export(args.ckpt, args.out)
    else:
        check(args.ckpt)

if __name__ == "__main__":
    run(main, "python -m weights.convert", stopped="stopped; nothing was written")
