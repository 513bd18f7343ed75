"""A training step beside the same step built from transformers and peft: seconds, memory, utilisation.

Both have the same weights, batch and losses (checked), without dropout; bf16 on a GPU, float32 elsewhere. Utilisation
(MFU): the step's counted operations over those that a plain matrix product does here in the same time. Not here: the
other side's modules (reference.py); memory at sizes that do not fit this machine (memory.py).

    python -m bench.train_step --stage 3 --text 256
"""
import argparse
import multiprocessing
import resource
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch.ops import aten
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from bench.reference import twin_losses, use_twins
from infra.cli import add_options, option, read_options, run
from infra.distributed import Distributed
from infra.files import set_parameter
from llama import LlamaConfig
from model import PRESETS, Config, VideoChat2, set_trainable
from prompt import IGNORE, VIDEO, add_packing
from qformer import QFormerConfig
from vit_video import ViTConfig
from weights.checkpoint import is_frozen_llm

SCALED = Config(                        # vicuna-7b at a hundredth of the cost, its parts in similar proportions
    preset="scaled", vit=ViTConfig(img_size=112, patch_size=16, width=256, depth=6, heads=4),
    qformer=QFormerConfig(vocab_size=4000, width=96, depth=12, heads=3, ffn=384, vision_width=256),
    llama=LlamaConfig(vocab_size=4000, width=512, depth=8, heads=8, kv_heads=8, ffn=1376))
CPU_ATTENTION = {                       # operations that PyTorch's counter does not know
    aten._scaled_dot_product_flash_attention_for_cpu: lambda *qkv, **_: sdpa_flop_count(*qkv[:3]),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *x, **_: sdpa_backward_flop_count(*x[:4])}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32

@dataclass
class Step:
    stage: int = option(3, "stage of training", choices=(1, 2, 3))
    preset: str = option("scaled", "sizes of the model", choices=("scaled", *PRESETS))
    batch: int = option(4, "clips")
    frames: int = option(0, "frames of a clip (default: 4 in stage 1, 8 in stages 2 and 3)")
    text: int = option(0, "tokens of the longest text, the video's not counted (default: 32, 64, 512 by stage)")

    def __post_init__(self):
        self.frames, self.text = self.frames or (4, 8, 8)[self.stage - 1], self.text or (32, 64, 512)[self.stage - 1]
        if min(self.batch, self.frames, self.text) < 1:
            raise ValueError("--batch, --frames and --text must be 1 or more")

    def __str__(self):
        return f"{self.preset}, stage {self.stage}: {self.batch} clips, {self.frames} frames, {self.text} text tokens"

def step_config(step):
    """The preset's Config for the step's frames; the toy's vocabularies, which depend on its tokenizers, are 1,000."""
    cfg = SCALED if step.preset == "scaled" else PRESETS[step.preset]()
    return replace(cfg, align_frames=step.frames, bos_ones=False,
                   vit=replace(cfg.vit, frames=step.frames, pos_scale=1.0),
                   qformer=replace(cfg.qformer, vocab_size=cfg.qformer.vocab_size or 1000),
                   llama=replace(cfg.llama, vocab_size=cfg.llama.vocab_size or 1000))

def random_batch(cfg, step, shortest=0.25):
    """Random clips, and texts of shortest * step.text to step.text tokens, of which every second one has a loss."""
    g, vocab = torch.Generator().manual_seed(0), min(cfg.qformer.vocab_size, cfg.llama.vocab_size)
    lengths = torch.randint(int(shortest * step.text), step.text + 1, (step.batch - 1,), generator=g).tolist()

    # the video's slot, which stage 1 does not have, and a text from column 0 on; the first text is the longest
    column = torch.arange(-(cfg.n_query + cfg.n_extra) if step.stage > 1 else 0, step.text)     # (Q + S,)
    mask = column < torch.tensor([step.text, *lengths])[:, None]                        # (B, Q + S)
    is_text = mask & (column >= 0)                                                      # (B, Q + S)
    ids = torch.where(column < 0, VIDEO, 0).repeat(step.batch, 1)                       # (B, Q + S)
    ids[is_text] = torch.randint(5, vocab, (int(is_text.sum()),), generator=g)
    labels = ids.where(is_text & (column % 2 == 1), IGNORE)                             # (B, Q + S)

    # as a collate function of data.py makes them
    video = torch.randn(step.batch, step.frames, 3, cfg.vit.img_size, cfg.vit.img_size, generator=g)
    batch = {"video": video, "ids": ids, "labels": labels, "mask": mask.long(), "idx": torch.arange(step.batch)}
    if step.stage == 3:
        instruction = torch.randint(5, vocab, (step.batch, 64), generator=g)
        batch |= {"instruction_ids": instruction, "instruction_mask": torch.ones_like(instruction)}
    return add_packing(batch)

def our_model(cfg, stage, device=DEVICE, dtype=DTYPE, dropout=False):
    """VideoChat2 with random weights, ready to train; dtype: of its frozen LLM."""
    if not dropout:                                            # the two sides would draw it differently
        cfg = replace(cfg, lora_dropout=0.0, qformer=replace(cfg.qformer, dropout=0.0, drop_path=0.0))
    torch.manual_seed(0)
    with torch.device(device):
        model = VideoChat2(cfg, stage, defer_llm=True)
    for name, p in list(model.named_parameters()):
        if is_frozen_llm(name):                                # made in its dtype: float32 would take 27 GB of a 7B LLM
            t = torch.ones(p.shape, device=device, dtype=dtype)
            set_parameter(model, name, t if p.ndim == 1 else t.normal_(std=p.shape[1] ** -0.5))
        elif name.startswith("extra_query") or "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)                 # zeros would hide whatever reads them
    set_trainable(model, stage)
    return model.train()

def step_losses(model, batch, generator=None):
    """{name: loss} of the model's stage. generator draws the hard negatives of stage 1."""
    if model.stage > 1:
        return {"lm": model.lm_loss(batch)}
    return model.stage1_losses(batch, 3, Distributed(), generator)

def seconds_of(call, min_run_time):
    """The median; Timer waits for a GPU."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=min_run_time).median

def matmul_rate(n=8192 if DEVICE == "cuda" else 1024):
    """Operations a second of a product of two n x n matrices."""
    a, b = torch.randn(2, n, n, device=DEVICE, dtype=DTYPE)                             # 2 x (n, n)
    return 2 * n ** 3 / seconds_of(lambda: a @ b, 0.5)

def measure(side, step, min_run_time=5):
    """Trains one side, "ours" or "transformers", in this process -> its "losses" in the first step, by name; "seconds"
    of a step, "peak" bytes, "mfu"."""
    # both sides draw the same weights, batch and hard negatives
    cfg, generator = step_config(step), torch.Generator().manual_seed(0)
    model, losses_of = our_model(cfg, step.stage), step_losses
    if side == "transformers":
        model, losses_of = use_twins(model), twin_losses
    batch = {name: t.to(DEVICE) if torch.is_tensor(t) else t for name, t in random_batch(cfg, step).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def train():
        with torch.autocast(DEVICE, DTYPE, enabled=DEVICE == "cuda"):
            losses = losses_of(model, batch, generator)
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return losses

    # the losses of the first step, the operations of the second, the time of the others
    losses = {name: loss.item() for name, loss in train().items()}
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        train()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()                   # making the model may have taken more
    seconds, kib = seconds_of(train, min_run_time), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else kib * 1024
    return {"losses": losses, "seconds": seconds, "peak": peak,
            "mfu": counter.get_total_flops() / seconds / matmul_rate()}

def main(argv=None):
    parser = argparse.ArgumentParser("python -m bench.train_step", description=__doc__.splitlines()[0])
    add_options(parser, Step)
    step, _ = read_options(parser, Step, argv)
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{step}; {DTYPE} on {where}", flush=True)

    # each side in a process of its own, whose peak memory never falls; a forked one would begin with this one's
    losses = {}
    for side in ("ours", "transformers"):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            result = pool.submit(measure, side, step).result()
        losses[side], seconds = result["losses"], result["seconds"]
        print(f"  {side:13}{seconds:8.3f} s{step.batch / seconds:9.2f} clips/s{result['peak'] / 2 ** 30:7.2f} GiB"
              f"{result['mfu']:6.0%} MFU   " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses[side].items()),
              flush=True)

    # unequal losses would mean that the two did not compute the same
    for name, loss in losses["ours"].items():
        if abs(loss - losses["transformers"][name]) > (1e-4 if DTYPE == torch.float32 else 2e-2) * abs(loss):
            raise ValueError(f"loss {name} is {loss} with our modules, {losses['transformers'][name]} with the others")

if __name__ == "__main__":
    run(main, "bench.train_step")
