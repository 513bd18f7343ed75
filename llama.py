"""The language model: token embeddings (B, S, D) -> next-token logits (B, S, V); generation with a key/value cache.

LLaMA 1 and 2 (Vicuna), and Mistral, in which a group of query heads shares its key/value heads. The input is embeddings
instead of ids, because the tokens of a video have no ids.

    embeds -> [ x + attention(norm(x)); x + swiglu(norm(x)) ] x depth -> norm -> lm_head -> logits

Not here: tokenisation (tokenizer.py), LoRA (lora.py), Hugging Face folders (weights/hf_llama.py), sliding windows.

Source: LLaMA (arXiv 2302.13971), GQA (arXiv 2305.13245), RoPE (arXiv 2104.09864). Attribute names and the half-split
rotation are Hugging Face's, so weights load without renaming or permuting.
Run:    python -m pytest tests/test_llama.py
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

@dataclass
class LlamaConfig:
    vocab_size: int = 32000
    width: int = 4096
    depth: int = 32
    heads: int = 32
    kv_heads: int = 32            # fewer than heads: each key/value head serves heads / kv_heads query heads
    ffn: int = 11008
    eps: float = 1e-6
    rope_theta: float = 1e4
    max_positions: int = 2048     # the length it was trained for; longer inputs raise an error
    head_dim: int = 0             # size of a head; 0: width / heads
    tied: bool = False            # lm_head and the embeddings are one matrix
    attention_bias: bool = False  # biases of q, k, v, o: none in LLaMA, Vicuna and Mistral
    mlp_bias: bool = False        # biases of gate, up, down
    init_std: float = 0.02        # 0: by the inputs of each matrix (vit_video.ViTConfig)
    checkpoint_layers: bool = False  # training: recompute each layer in the backward pass instead of storing it

    def __post_init__(self):
        if self.head_size % 2 or not self.head_dim and self.width % self.heads:
            raise ValueError(f"LLM width {self.width} does not give its {self.heads} heads an even size")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} key/value heads evenly")

    @property
    def head_size(self):
        return self.head_dim or self.width // self.heads

# ------------------------------------------------------------------------------------------------------------ the parts

class KVCache:
    """Keys and values of all tokens so far, and their padding mask. To hide a token from all later ones, zero its
    column of the mask; to forget the last tokens, shorten the mask."""
    def __init__(self, depth):
        self.layers = [None] * depth    # k, v (B, kv_heads, room, hs) each, of which the first S columns are in use
        self.mask = None                # (B, S) 1 = token

    def append(self, layer_idx, k, v):
        """New k, v (B, kv_heads, s, hs) -> all k, v (B, kv_heads, S, hs) of a layer, S being the mask's length."""
        S, layer = self.mask.shape[1], self.layers[layer_idx]
        start = S - k.shape[2]

        # make room, for 64 more tokens than needed
        if layer is None or layer[0].shape[2] < S:
            wider = tuple(t.new_empty(*t.shape[:2], S + 64, t.shape[3]) for t in (k, v))
            for new, old in zip(wider, layer or (), strict=False):
                new[:, :, :start] = old[:, :, :start]
            layer = self.layers[layer_idx] = wider

        for cached, new in zip(layer, (k, v), strict=True):
            cached[:, :, start:S] = new
        return tuple(t[:, :, :S] for t in layer)

    @torch.no_grad()
    def select_rows(self, rows, room=64):
        """A cache of these rows (indices (b,), which may repeat), with room for this many more tokens."""
        S = self.mask.shape[1]
        selected, rows = KVCache(len(self.layers)), torch.as_tensor(rows, device=self.mask.device)
        selected.mask = self.mask[rows]
        for i, layer in enumerate(self.layers):
            selected.layers[i] = tuple(t.new_empty(len(rows), t.shape[1], S + room, t.shape[3]) for t in layer)
            for new, t in zip(selected.layers[i], layer, strict=True):
                torch.index_select(t[:, :, :S], 0, rows, out=new[:, :, :S])
        return selected

class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        y = x.float()             # squares overflow float16 and lose bits in bfloat16
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)

def rope_cos_sin(positions, head_size, theta, dtype):
    """positions (B, S) -> cos and signed sin of a head's angles, (B, S, 1, hs) each, for apply_rope."""
    pair = torch.arange(0, head_size, 2, device=positions.device).float()       # (hs/2,)
    angle = positions[..., None].float() * theta ** (-pair / head_size)         # (B, S, hs/2)
    cos = torch.cat((angle.cos(), angle.cos()), dim=-1)                         # (B, S, hs)
    sin = torch.cat((-angle.sin(), angle.sin()), dim=-1)                        # (B, S, hs), with apply_rope's minus
    return cos[:, :, None].to(dtype), sin[:, :, None].to(dtype)                 # (B, S, 1, hs)

def apply_rope(x, cos, signed_sin):
    """Rotate x (B, S, nh, hs) by the angles of its positions: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin).
    subtle: channel j pairs with j + hs/2 (Hugging Face), not with its neighbour (the paper, Meta's files)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), signed_sin)    # (B, S, nh, hs)

class Attention(nn.Module):
    def __init__(self, cfg, layer_idx):
        super().__init__()
        self.layer_idx, self.hs = layer_idx, cfg.head_size
        self.q_proj = nn.Linear(cfg.width, cfg.heads * self.hs, bias=cfg.attention_bias)
        self.k_proj = nn.Linear(cfg.width, cfg.kv_heads * self.hs, bias=cfg.attention_bias)
        self.v_proj = nn.Linear(cfg.width, cfg.kv_heads * self.hs, bias=cfg.attention_bias)
        self.o_proj = nn.Linear(cfg.heads * self.hs, cfg.width, bias=cfg.attention_bias)

    def heads(self, x):
        return x.unflatten(-1, (-1, self.hs))                                   # (B, S, nh, hs)

    def forward(self, x, rope, n_out, mask, lengths, cache):
        """x (B, s, D) -> (B, n_out, D), of the last n_out tokens. The arguments are Llama._layers'."""
        # keys and values of the new tokens, and of those before them
        k = apply_rope(self.heads(self.k_proj(x)), *rope).transpose(1, 2)       # (B, kv_heads, s, hs)
        v = self.heads(self.v_proj(x)).transpose(1, 2)                          # (B, kv_heads, s, hs)
        if cache is not None:
            k, v = cache.append(self.layer_idx, k, v)                           # (B, kv_heads, S, hs)
        if n_out == 0:                                                          # only the cache was to be filled
            return x[:, :0]

        # queries of the last n_out tokens; each key/value head serves a group of query heads
        q = self.heads(self.q_proj(x[:, -n_out:]))                              # (B, n_out, nh, hs)
        q = apply_rope(q, *(t[:, -n_out:] for t in rope)).transpose(1, 2)       # (B, nh, n_out, hs)
        group = q.shape[1] // k.shape[1]
        if group > 1:
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)     # (B, nh, S, hs)

        if lengths is None:
            # without a mask a sequence (n_out = S) is causal, and a single new token (n_out = 1) sees all before it
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and n_out > 1)
            y = y.transpose(1, 2)                                               # (B, n_out, nh, hs)
        else:
            # packed texts: each sees itself only
            texts = zip(*(t.split(lengths, dim=2) for t in (q, k, v)), strict=True)
            y = [F.scaled_dot_product_attention(*text, is_causal=True).transpose(1, 2) for text in texts]
            y = torch.cat(y, dim=1)                                             # (1, N, nh, hs)
        return self.o_proj(y.flatten(2))                                        # (B, n_out, D)

class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.width, cfg.ffn, bias=cfg.mlp_bias)
        self.up_proj = nn.Linear(cfg.width, cfg.ffn, bias=cfg.mlp_bias)
        self.down_proj = nn.Linear(cfg.ffn, cfg.width, bias=cfg.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

class Layer(nn.Module):
    def __init__(self, cfg, layer_idx):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.width, cfg.eps)
        self.self_attn = Attention(cfg, layer_idx)
        self.post_attention_layernorm = RMSNorm(cfg.width, cfg.eps)
        self.mlp = MLP(cfg)

    def forward(self, x, rope, n_out, mask, lengths, cache, target_positions):
        """x (B, s, D) -> (B, n_out, D), or (1, n, D) at target_positions. The arguments are Llama._layers'."""
        x = x[:, x.shape[1] - n_out:] + self.self_attn(self.input_layernorm(x), rope, n_out, mask, lengths, cache)
        if target_positions is not None:
            x = x.index_select(1, target_positions)                             # (1, n, D)
        return x + self.mlp(self.post_attention_layernorm(x))                   # (B, n_out, D)

# ------------------------------------------------------------------------------------------------------------ the model

def attention_mask(mask, s, dtype):
    """What the s newest tokens may see of all S: (B or 1, 1, s, S), 0 or -inf, to be added to the scores; None where
    causality alone is right. mask: the padding mask (B, S), 1 = token."""
    S, no_padding = mask.shape[1], mask.all().item()
    # subtle: padding after the last real token does no harm, for no real token sees what comes after it
    if no_padding and s in (1, S) or s == S and (mask.diff(dim=1) <= 0).all():
        return None

    visible = torch.ones(s, S, dtype=torch.bool, device=mask.device).tril(S - s)[None, None]    # (1, 1, s, S)
    if not no_padding:
        # subtle: a padding row on the left may see nothing, and softmax over nothing is NaN: let each row see itself
        diagonal = torch.eye(s, S, dtype=torch.bool, device=mask.device).roll(S - s, dims=1)    # (s, S)
        visible = visible & mask.bool()[:, None, None, :] | diagonal            # (B, 1, s, S)
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -torch.inf)

class Llama(nn.Module):
    """forward reads padded batches, with a cache or without; forward_packed reads texts without padding, for training.
    Both return hidden states after the final norm: logits are self.lm_head(hidden), where a caller needs them."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(cfg.vocab_size, cfg.width),
            "layers": nn.ModuleList(Layer(cfg, i) for i in range(cfg.depth)),
            "norm": RMSNorm(cfg.width, cfg.eps),
        })
        self.lm_head = nn.Linear(cfg.width, cfg.vocab_size, bias=False)

        # initial weights of all matrices; 2 * depth branches add up in x
        for name, p in self.named_parameters():
            if p.ndim == 2:
                std = 1.0 if "embed_tokens" in name else p.shape[1] ** -0.5
                std /= (2 * cfg.depth) ** 0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
                nn.init.normal_(p, std=cfg.init_std or std)
        if cfg.tied:
            self.tie()

    def tie(self):
        head = getattr(self.lm_head, "base", self.lm_head)                      # LoRA wraps the layer
        head.weight = self.model["embed_tokens"].weight

    def embed(self, ids):                                                       # (B, S)
        return self.model["embed_tokens"](ids)                                  # (B, S, D)

    def forward(self, embeds, mask=None, cache=None, logits_to_keep=None):
        """embeds (B, s, D), mask (B, s) 1 = token, padding left or right -> hidden (B, s, D). With a KVCache, both are
        of the new tokens. logits_to_keep: return the last tokens only; the last layer then computes no others, and with
        0 only fills the cache. ValueError beyond cfg.max_positions tokens."""
        # the mask of all tokens so far, and the positions of the new ones; padding is not counted
        s = embeds.shape[1]
        if mask is None:
            mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)     # (B, s)
        if cache is not None:
            cache.mask = mask = mask if cache.mask is None else torch.cat((cache.mask, mask), dim=1)    # (B, S)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -s:]            # (B, s)
        if mask.shape[1] > self.cfg.max_positions:                              # else no need to sync a GPU
            self._check_length(mask.sum(1).max().item())

        # the last layer may compute fewer tokens, whose mask is another
        n_out = s if logits_to_keep is None else logits_to_keep
        masks = {n: attention_mask(mask, n, embeds.dtype) for n in {s, n_out}}  # (B or 1, 1, n, S) or None
        return self._layers(embeds, positions, n_out, masks, cache=cache)       # (B, n_out, D)

    def forward_packed(self, embeds, lengths, target_positions=None):
        """embeds (1, N, D): texts of these lengths, one after another; each sees itself only -> hidden (1, N, D), or
        (1, n, D) at target_positions (n,). ValueError for a text beyond cfg.max_positions tokens."""
        self._check_length(max(lengths))
        positions = torch.cat([torch.arange(n, device=embeds.device) for n in lengths])[None]   # (1, N)
        return self._layers(embeds, positions, embeds.shape[1], lengths=lengths, target_positions=target_positions)

    def _check_length(self, longest):
        if longest > (limit := self.cfg.max_positions):
            raise ValueError(f"{longest} tokens, but the LLM takes at most {limit}: shorten the text or the video")

    def _layers(self, x, positions, n_out, masks=None, lengths=None, cache=None, target_positions=None):
        """x (B, s, D) at positions (B, s) -> (B, n_out, D). masks[n]: attention_mask of n queries; packed: lengths."""
        rope = rope_cos_sin(positions, self.cfg.head_size, self.cfg.rope_theta, x.dtype)    # (B, s, 1, hs) each
        recompute = self.cfg.checkpoint_layers and self.training and torch.is_grad_enabled()
        for i, layer in enumerate(self.model["layers"]):
            is_last = i == self.cfg.depth - 1
            n = n_out if is_last else x.shape[1]
            args = (x, rope, n, masks and masks[n], lengths, cache, target_positions if is_last else None)
            x = checkpoint(layer, *args, use_reentrant=False) if recompute else layer(*args)
        return self.model["norm"](x)                                            # (B, n_out, D)

    @torch.no_grad()
    def generate(self, embeds, mask=None, max_new_tokens=100, stop=None, temperature=0.0, generator=None):
        """Continue prompts: embeds (B, S, D), padded on the left (else ValueError) -> B lists of new ids.
        stop: a function of a row's new ids, True where the row is complete; what completed it stays. temperature 0 is
        greedy; above it, tokens are sampled with generator, a CPU one."""
        if mask is not None and not mask[:, -1].all():
            raise ValueError("a prompt ends in padding: generate needs prompts padded on the left")
        cache = KVCache(self.cfg.depth)
        rows, done = [[] for _ in embeds], [False] * len(embeds)
        for _ in range(max_new_tokens):
            # the next token of every row
            logits = self.lm_head(self(embeds, mask, cache, logits_to_keep=1)[:, 0])    # (B, V)
            if temperature == 0:
                ids = logits.argmax(-1)                                         # (B,)
            else:
                # on the CPU, so that one generator serves every device and a seed gives the same tokens on each
                probs = (logits.float() / temperature).softmax(-1).cpu()        # (B, V)
                ids = torch.multinomial(probs, 1, generator=generator)[:, 0].to(logits.device)  # (B,)

            # rows end one by one
            for i, token in enumerate(ids.tolist()):
                if not done[i]:
                    rows[i].append(token)
                    done[i] = stop is not None and stop(rows[i])
            if all(done):
                break
            embeds, mask = self.embed(ids[:, None]), None                       # (B, 1, D)
        return rows
