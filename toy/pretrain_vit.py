"""What the toy's video ViT is pretrained on: linear heads on it name what covers each patch.

    PatchLabels -> video (B, T, 3, H, W), targets (B, T, L, 3) -> PatchClassifier -> loss

UMT aligns each patch token with a teacher's feature of its patch. Here the teacher is the toy world's ground truth.
The heads are dropped afterwards, as UMT's decoder is. Not here: the command, its options and files (toy/pretrain.py).
Source of the idea: UMT (arXiv 2303.16058), section 3.

    python -m toy.pretrain vit
"""
import json
import random

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import collate_media
from toy.things import STRAIGHT
from vit_video import VisionTransformer

class PatchClassifier(nn.Module):
    """The video ViT with linear heads on every patch token, which stage 1 drops.

    They name colour, shape and activity of what covers the patch, and its place and time: without these two the ViT
    would soon forget them, and the Q-Former could then name both scenes of a clip but not their order."""

    def __init__(self, cfg, classes):
        super().__init__()
        self.vision_encoder, self.norm = VisionTransformer(cfg.vit), nn.LayerNorm(cfg.vit.width)
        sizes = [*classes, cfg.vit.grid ** 2, cfg.train_frames]
        self.heads = nn.ModuleList([nn.Linear(cfg.vit.width, n) for n in sizes])

    def forward(self, video):
        """video (B, T, 3, H, W) -> logits (B, T, L, classes) of each head: colour, shape, activity, place, time."""
        x = self.norm(self.vision_encoder(video))                          # (B, T, L, C)
        return [head(x) for head in self.heads]

    def losses(self, batch):
        """video (B, T, 3, H, W), targets (B, T, L, 3) -> weighted cross-entropies of each head, by name."""
        targets = batch["targets"]
        B, T, L, _ = targets.shape
        place, time = torch.arange(L, device=targets.device), torch.arange(T, device=targets.device)[:, None]
        targets = (*targets.unbind(-1), place.expand(B, T, L), time.expand(B, T, L))

        # nine patches in ten are background, class 0, and would drown the rest: the shapes of single objects were right
        # on 25 to 36 % after 25,000 clips. One weighs a fiftieth of a covered one, and every clip weighs the same
        weight = 0.02 + 0.98 * (targets[1] > 0)                            # (B, T, L)
        weight = (weight / weight.sum((1, 2), keepdim=True) / B).flatten()  # (B*N,)

        # activity is the slowest to learn and weighs double
        losses, names = {}, ("colour", "shape", "activity", "place", "time")
        for name, logits, target in zip(names, self(batch["video"]), targets, strict=True):
            loss = F.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="none")  # (B*N,)
            losses[name] = (2 if name == "activity" else 1) * (loss * weight).sum()
        return losses

class PatchLabels(torch.utils.data.Dataset):
    """Clips with the class of every patch: targets.npy (clips, frames, patches, 3), in the order of the annotations.

    Epochs 0 to 6 have the playground's clips in which everything moves straight ahead or rests; the others all of the
    playground, and as many of the tasks. Both are needed: on all movements at once, activity was right on 18 % of the
    playground's patches after 1,500 steps of 8; after 700 steps of straight lines and 800 of everything, on 32 %."""

    def __init__(self, clips, targets, annotations, frames, epoch_size):
        self.clips, self.targets, self.frames, self.epoch_size, self.epoch = clips, targets, frames, epoch_size, 0
        rows = [(c["scenario"], {e["action"] for e in c["events"]}) for c in map(json.loads, open(annotations))]
        self.tasks = [i for i, (scenario, _) in enumerate(rows) if scenario != "playground"]
        self.playground = [i for i, (scenario, _) in enumerate(rows) if scenario == "playground"]
        self.straight = [i for i in self.playground if rows[i][1].issubset(STRAIGHT)]

    def __len__(self):
        return self.epoch_size

    def set_epoch(self, epoch):
        self.epoch = epoch
        self.clips.set_epoch(epoch)

    def __getitem__(self, index):
        pool = self.straight if self.epoch < 7 else (self.playground, self.tasks)[index % 2]
        sample = self.clips[random.Random(f"{self.epoch} {index}").choice(pool)]
        targets = self.targets[sample["idx"]][self.frames]                 # (T, L, 3)
        return sample | {"targets": torch.from_numpy(targets.astype(np.int64))}

def collate_patches(samples):
    return collate_media(samples) | {"targets": torch.stack([s["targets"] for s in samples])}   # (B, T, L, 3)
