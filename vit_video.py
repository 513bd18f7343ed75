"""The video ViT: pixels (B, T, 3, H, W) -> patch features (B, T, L, C). model.py explains these letters.

UMT-L/16, a plain ViT: every patch of every frame attends to every other. An image is a video of one frame.

    frames -> patches -> + position -> [ x + attention(norm(x)); x + mlp(norm(x)) ] x depth -> features

Not here: the LayerNorm after it and stage 1's temporal embedding (model.py), the normalisation of pixels (video.py).

Source: UMT (arXiv 2303.16058); video_chat2/models/blip2/vit.py. Attribute names are those of l16_25m.pth.
Run:    python -m pytest tests/test_vit_video.py
"""
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

@dataclass
class ViTConfig:
    img_size: int = 224
    patch_size: int = 16
    width: int = 1024
    depth: int = 23               # UMT-L has 24 blocks; VideoChat2 takes the 23rd's output, so the last is not built
    heads: int = 16
    mlp_ratio: int = 4
    frames: int = 4               # the position table is made for 4 frames and stretched in time for other clips
    eps: float = 1e-6
    pos_table: str = "sinusoid"   # or "resized14": see position_table
    pos_scale: float = 1.0        # factor of the positions; the toy, trained from scratch, has 2 (model.TOY)
    # std of the initial weights. 0.02 suits layers of about 2,500 inputs (1 / sqrt(2500)) and is too small for narrow
    # ones, so 0 means: 1 / sqrt(inputs) of each matrix. It is the same in qformer.py and llama.py.
    init_std: float = 0.02
    checkpoint_blocks: bool = False  # training: recompute each block in the backward pass instead of storing it

    def __post_init__(self):
        if self.img_size % self.patch_size:
            raise ValueError(f"img_size {self.img_size} is not a multiple of patch_size {self.patch_size}")
        if self.width % self.heads:
            raise ValueError(f"ViT width {self.width} is not a multiple of its {self.heads} heads")
        if self.pos_table not in ("sinusoid", "resized14"):
            raise ValueError(f'pos_table is "{self.pos_table}", expected "sinusoid" or "resized14"')

    @property
    def grid(self):
        return self.img_size // self.patch_size     # patches along one side of a frame; L is its square

# --------------------------------------------------------------------------------- positions: fixed tables, not weights

def sinusoid(n, width):
    """Positions 0..n-1 -> (n, width) float32: sin in the even columns, cos in the odd. Source: vit.py:163."""
    position = torch.arange(n, dtype=torch.float64, device="cpu")[:, None]      # (n, 1)
    pair = torch.arange(width, dtype=torch.float64, device="cpu") // 2          # (width,) 0 0 1 1 2 2 ...
    angle = position / 10000 ** (2 * pair / width)                              # (n, width)
    table = angle.sin()
    table[:, 1::2] = angle[:, 1::2].cos()
    return table.float()

@lru_cache(maxsize=16)            # and no buffer, so that a model built on the meta device has its positions, too
@torch.no_grad()
def position_table(frames, grid, width, pos_table, T, device):
    """Positions (T, L, C) of T frames of grid x grid patches, from a table that is made for `frames` frames.
    subtle: they are one long line. Frame 1 begins at position L, where frame 0 ended: a patch's row, column and time
    are not encoded separately."""
    # QUIRK vit.py:197: for img_size other than 224 the official table is always that of 14 x 14 patches, resized
    side = 14 if pos_table == "resized14" else grid
    table = sinusoid(frames * side * side, width)                               # (frames * side * side, C)

    # resize in space: bicubic, each frame separately. Source: vit.py:197
    if side != grid:
        table = table.view(frames, side, side, width).permute(0, 3, 1, 2)       # (frames, C, side, side)
        table = F.interpolate(table, size=(grid, grid), mode="bicubic", align_corners=False)
        table = table.permute(0, 2, 3, 1)                                       # (frames, grid, grid, C)
    table = table.reshape(frames, grid * grid, width)                           # (frames, L, C)

    # resize in time: linear; an image takes the first frame's positions. Source: vit.py:163
    if T == 1:
        return table[:1].to(device)                                             # (1, L, C)
    table = table.permute(1, 2, 0)                                              # (L, C, frames)
    table = F.interpolate(table, size=T, mode="linear", align_corners=False)    # (L, C, T)
    return table.permute(2, 0, 1).contiguous().to(device)                       # (T, L, C)

# ---------------------------------------------------------------------------------- the network, parts before the whole

class PatchEmbed(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        size = (1, cfg.patch_size, cfg.patch_size)
        self.proj = nn.Conv3d(3, cfg.width, kernel_size=size, stride=size)

    def forward(self, video):                                                   # (B, T, 3, H, W)
        # the kernel moves by its own size, so one matrix product over all patches gives the same sums, faster
        p = self.proj.kernel_size[-1]
        x = video.unflatten(-1, (-1, p)).unflatten(3, (-1, p))                  # (B, T, 3, grid, p, grid, p)
        x = x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(2, 3)             # (B, T, L, 3*p*p)
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)         # (B, T, L, C)

class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.heads
        self.qkv = nn.Linear(cfg.width, 3 * cfg.width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(cfg.width))
        self.v_bias = nn.Parameter(torch.zeros(cfg.width))
        self.proj = nn.Linear(cfg.width, cfg.width)

    def forward(self, x):                                                       # (B, N, C)
        # keys need no bias: it would add the same number to all scores of a query, which softmax ignores
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))         # (3*C,)
        qkv = F.linear(x, self.qkv.weight, bias)                                # (B, N, 3*C)
        q, k, v = qkv.unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)            # 3 x (B, nh, N, hs)
        y = F.scaled_dot_product_attention(q, k, v)                             # (B, nh, N, hs)
        return self.proj(y.transpose(1, 2).flatten(2))                          # (B, N, C)

class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.fc1 = nn.Linear(cfg.width, cfg.mlp_ratio * cfg.width)
        self.fc2 = nn.Linear(cfg.mlp_ratio * cfg.width, cfg.width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))

class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.width, eps=cfg.eps)
        self.attn = Attention(cfg)
        self.norm2 = nn.LayerNorm(cfg.width, eps=cfg.eps)
        self.mlp = MLP(cfg)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

class VisionTransformer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.patch_embed = PatchEmbed(cfg)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=cfg.init_std or module.in_features ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def positions(self, T, device):
        """(T, L, C), which forward adds to the patches."""
        cfg = self.cfg
        table = position_table(cfg.frames, cfg.grid, cfg.width, cfg.pos_table, T, device)   # (T, L, C)
        # the weights' dtype, not the patches': under autocast the residual stream then stays in float32
        return cfg.pos_scale * table.to(self.patch_embed.proj.weight.dtype)

    def forward(self, video):
        """video (B, T, 3, H, W), float, normalised, H = W = img_size -> (B, T, L, C). ValueError for another shape."""
        size = self.cfg.img_size
        if video.ndim != 5 or video.shape[2:] != (3, size, size):
            raise ValueError(f"video is {tuple(video.shape)}, expected (B, T, 3, {size}, {size})")

        # patches of all frames become one sequence
        T = video.shape[1]
        x = self.patch_embed(video) + self.positions(T, video.device)           # (B, T, L, C)
        x = x.flatten(1, 2)                                                     # (B, N, C), N = T*L

        # the blocks, and back to frames
        recompute = self.cfg.checkpoint_blocks and self.training and torch.is_grad_enabled()
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return x.unflatten(1, (T, -1))                                          # (B, T, L, C)
