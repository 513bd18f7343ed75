"""
The voice: token embeddings (B, S, D) -> next-token logits (B, S, V), and generation with a key/value cache.

LLaMA 1 and 2 (Vicuna), and Mistral, whose key/value heads are shared by groups of query heads. It reads embeddings,
not ids, because a video's tokens have no ids.

    embeds -> [ x + attention(norm(x)); x + swiglu(norm(x)) ] x depth -> norm -> lm_head -> logits

Not here: tokenisation (tokenizer.py), LoRA (lora.py), reading Hugging Face folders (weights/hf_llama.py), sliding windows.

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
    max_positions: int = 2048     # the length it was trained for; longer inputs are refused
    head_dim: int = 0             # size of a head; 0: width / heads
    tied: bool = False            # lm_head's matrix is the embeddings'
    attention_bias: bool = False  # biases of q, k, v, o: none in LLaMA, Vicuna and Mistral
    mlp_bias: bool = False        # biases of gate, up, down
    init_std: float = 0.02        # 0: by each matrix's width, see init_weights
    checkpoint_layers: bool = False  # training: recompute each layer in the backward pass instead of storing it

    def __post_init__(self):
        if self.head_size % 2 or not self.head_dim and self.width % self.heads:
            raise ValueError(f"LLM width {self.width} does not give its {self.heads} heads an even size")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} key/value heads evenly")

    @property
    def head_size(self):
        return self.head_dim or self.width // self.heads

# ----------------------------------------------------------------------------------------------------------------------
# the parts

class KVCache:
    """
    Keys and values of all tokens so far, per layer (B, kv_heads, room, hs), of which the first S places are filled, and
    the padding mask (B, S) that goes with them: to hide a token from all that follow, zero its place there; to forget
    the last ones, shorten it.
    """
    def __init__(self, depth):
        self.layers = [None] * depth
        self.mask = None          # (B, S) 1 = token

    def append_mask(self, mask):
        """The new tokens' mask (B, s) -> the mask (B, S) of all. Goes before append."""
        self.mask = mask if self.mask is None else torch.cat((self.mask, mask), dim=1)      # (B, S)
        return self.mask

    def append(self, i, k, v):
        """Layer i's new k, v (B, kv_heads, s, hs) -> all of its k, v (B, kv_heads, S, hs)."""
        S = self.mask.shape[1]
        begin = S - k.shape[2]
        if self.layers[i] is None or self.layers[i][0].shape[2] < S:
            old = self.layers[i] or (k[:, :, :0], v[:, :, :0])
            self.layers[i] = tuple(with_room(t[:, :, :begin], S + 64) for t in old)
        for kept, new in zip(self.layers[i], (k, v), strict=True):
            kept[:, :, begin:S] = new
        return tuple(t[:, :, :S] for t in self.layers[i])

    @torch.no_grad()
    def select_rows(self, rows, room=64):
        """A cache of these rows (indices (b,), repeated at will), with room for so many more tokens."""
        S = self.mask.shape[1]
        taken, rows = KVCache(len(self.layers)), torch.as_tensor(rows, device=self.mask.device)
        for i, layer in enumerate(self.layers):
            taken.layers[i] = tuple(t.new_empty(len(rows), t.shape[1], S + room, t.shape[3]) for t in layer)
            for new, t in zip(taken.layers[i], layer, strict=True):
                torch.index_select(t[:, :, :S], 0, rows, out=new[:, :, :S])
        taken.mask = self.mask[rows]
        return taken


def with_room(t, room):
    """t (B, kv_heads, S, hs) at the beginning of (B, kv_heads, room, hs)."""
    wide = t.new_empty(*t.shape[:2], room, t.shape[3])
    wide[:, :, :t.shape[2]] = t
    return wide


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        y = x.float()             # squares overflow float16 and lose bits in bfloat16
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rope_angles(positions, head_size, theta, dtype):
    """positions (B, S) -> cos and sin of a head's angles (B, S, 1, hs), as rotate takes them."""
    pair = torch.arange(0, head_size, 2, device=positions.device).float()       # (hs/2,)
    angle = positions[..., None].float() * theta ** (-pair / head_size)         # (B, S, hs/2)
    cos, sin = angle.cos(), angle.sin()
    return tuple(torch.cat(halves, dim=-1)[:, :, None].to(dtype) for halves in ((cos, cos), (-sin, sin)))


def rotate(x, cos, sin):
    """
    Turn x (B, S, nh, hs) by its positions' angles: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin).
    subtle: channel j pairs with j + hs/2 (Hugging Face), not with its neighbour (the paper, Meta's files).
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)       # (B, S, nh, hs)


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.hs = hs = cfg.head_size
        self.q_proj = nn.Linear(cfg.width, cfg.heads * hs, bias=cfg.attention_bias)
        self.k_proj = nn.Linear(cfg.width, cfg.kv_heads * hs, bias=cfg.attention_bias)
        self.v_proj = nn.Linear(cfg.width, cfg.kv_heads * hs, bias=cfg.attention_bias)
        self.o_proj = nn.Linear(cfg.heads * hs, cfg.width, bias=cfg.attention_bias)

    def heads(self, x):
        return x.unflatten(-1, (-1, self.hs))                                   # (B, S, nh, hs)

    def forward(self, x, n, rope, mask, cache, i):
        """x (B, s, D) -> (B, n, D). mask: (B, 1, n, S), or None, or the lengths of texts that lie end to end."""
        k = rotate(self.heads(self.k_proj(x)), *rope).transpose(1, 2)           # (B, kv_heads, s, hs)
        v = self.heads(self.v_proj(x)).transpose(1, 2)                          # (B, kv_heads, s, hs)
        if cache is not None:
            k, v = cache.append(i, k, v)                                        # (B, kv_heads, S, hs)
        if n == 0:
            return x[:, :0]
        q = rotate(self.heads(self.q_proj(x[:, -n:])), *(t[:, -n:] for t in rope)).transpose(1, 2)  # (B, nh, n, hs)
        groups = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(groups, dim=1) if groups > 1 else t for t in (k, v))    # (B, nh, S, hs)
        if isinstance(mask, list):                                              # each text sees itself alone
            texts = zip(*(t.split(mask, dim=2) for t in (q, k, v)), strict=True)
            y = torch.cat([attend(*text, is_causal=True) for text in texts], dim=1)     # (1, N, nh, hs)
        else:
            # without a mask: a whole sequence (n = S) is causal, a single new token (n = 1) sees all before it
            y = attend(q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1)      # (B, n, nh, hs)
        return self.o_proj(y.flatten(2))                                        # (B, n, D)


def attend(q, k, v, **how):
    """q (B, nh, n, hs), k and v (B, nh, S, hs) -> (B, n, nh, hs)."""
    return F.scaled_dot_product_attention(q, k, v, **how).transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.width, cfg.ffn, bias=cfg.mlp_bias)
        self.up_proj = nn.Linear(cfg.width, cfg.ffn, bias=cfg.mlp_bias)
        self.down_proj = nn.Linear(cfg.ffn, cfg.width, bias=cfg.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.width, cfg.eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.width, cfg.eps)
        self.mlp = MLP(cfg)

    def forward(self, x, n, rope, mask, cache, i, target_positions=None):
        """x (B, s, D), all of which is read -> the n last tokens' new state (B, n, D); of them only at these places."""
        x = x[:, x.shape[1] - n:] + self.self_attn(self.input_layernorm(x), n, rope, mask, cache, i)    # (B, n, D)
        x = x if target_positions is None else x.index_select(1, target_positions)
        return x + self.mlp(self.post_attention_layernorm(x))

# ----------------------------------------------------------------------------------------------------------------------
# the whole

def attention_mask(mask, s):
    """
    Padding mask (B, S) of all tokens so far, 1 = token -> what the s newest of them may see: (B or 1, 1, s, S) bool,
    or None where causality alone says it.
    """
    S = mask.shape[1]
    if s in (1, S) and mask.all():
        return None
    # subtle: behind the last real token padding does no harm, for no real token ever looks right
    if s == S and (mask.diff(dim=1) <= 0).all():
        return None
    causal = torch.ones(s, S, dtype=torch.bool, device=mask.device).tril(S - s)     # (s, S)
    if mask.all():
        return causal[None, None]                                                   # (1, 1, s, S)
    allowed = causal & mask.bool()[:, None, None, :]                                # (B, 1, s, S)
    # subtle: a padding row on the left may see nothing, and softmax over nothing is NaN: let each row see itself
    return allowed | torch.eye(s, S, dtype=torch.bool, device=mask.device).roll(S - s, dims=1)


def additive(allowed, dtype):
    """Bools -> 0 or minus infinity, to be added to the scores: attention would do this to bools in every layer."""
    return allowed if allowed is None else torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, -torch.inf)


class Llama(nn.Module):
    """
    forward: embeds (B, S, D), mask (B, S) 1 = token, padding left or right -> hidden (B, S, D) after the final norm;
    logits are self.lm_head(hidden), so that callers compute them only where they are needed. With a KVCache, embeds
    and mask are those of the new tokens only. Training has no padding: texts lie end to end in one row, (1, N, D), with
    their lengths. Raises ValueError beyond max_positions.
    """
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(cfg.vocab_size, cfg.width),
            "layers": nn.ModuleList(Layer(cfg) for _ in range(cfg.depth)),
            "norm": RMSNorm(cfg.width, cfg.eps),
        })
        self.lm_head = nn.Linear(cfg.width, cfg.vocab_size, bias=False)
        self.init_weights(cfg.init_std)
        if cfg.tied:
            self.tie()

    def tie(self):
        head = getattr(self.lm_head, "base", self.lm_head)                      # behind LoRA
        head.weight = self.model["embed_tokens"].weight

    def init_weights(self, std=0.02):
        """Normal with this std; 0: each matrix by its own width, as narrow models need it to learn quickly."""
        for name, p in self.named_parameters():
            if p.ndim == 2:
                own = 1.0 if "embed_tokens" in name else p.shape[1] ** -0.5
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    own /= (2 * self.cfg.depth) ** 0.5          # so many branches add up in the stream
                nn.init.normal_(p, std=std or own)

    def embed(self, ids):                                                       # (B, S)
        return self.model["embed_tokens"](ids)                                  # (B, S, D)

    def forward(self, embeds, mask=None, cache=None, logits_to_keep=None, lengths=None, target_positions=None):
        """embeds (B, s, D), mask (B, s) -> hidden (B, s, D), or (B, last, D): of so many last tokens alone.

        The last layer then computes no others; with 0 it only fills the cache.
        lengths: of texts end to end, embeds (1, N, D), each of which sees itself alone. places (n,): those of the N
        whose hidden is wanted -> (1, n, D).
        """
        s, depth = embeds.shape[1], self.cfg.depth
        wanted = [s] * (depth - 1) + [s if logits_to_keep is None else logits_to_keep]
        if lengths is None:
            mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device) if mask is None else mask
            mask = mask if cache is None else cache.append_mask(mask)           # (B, S), old tokens and new ones
            # n: (B, 1, n, S) or None
            masks = {n: additive(attention_mask(mask, n), embeds.dtype) for n in set(wanted)}
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -s:]        # (B, s), padding is not counted
            longest = mask.sum(1).max() if mask.shape[1] > self.cfg.max_positions else 0
        else:
            masks, longest = dict.fromkeys(wanted, lengths), max(lengths)
            positions = torch.cat([torch.arange(n, device=embeds.device) for n in lengths])[None]     # (1, N)
        if longest > self.cfg.max_positions:
            raise ValueError(f"{longest} tokens, but the LLM takes at most {self.cfg.max_positions}: shorten the text "
                             "or the video")
        rope = rope_angles(positions, self.cfg.head_size, self.cfg.rope_theta, embeds.dtype)
        recompute = self.cfg.checkpoint_layers and self.training and torch.is_grad_enabled()
        x = embeds
        for i, (layer, n) in enumerate(zip(self.model["layers"], wanted, strict=True)):
            args = (x, n, rope, masks[n], cache, i, target_positions if i == depth - 1 else None)
            x = checkpoint(layer, *args, use_reentrant=False) if recompute else layer(*args)
        return self.model["norm"](x)                                            # (B, last, D)

    @torch.no_grad()
    def generate(self, embeds, mask=None, max_new_tokens=100, stop=(), temperature=0.0, generator=None):
        """
        Continue a prompt: embeds (B, S, D), padded on the left -> a list of B lists of new ids.

        stop: ids that end a row (and are left out), or a function (the row's new ids) -> True when it is complete;
        what it stopped at is then kept. temperature 0 is greedy, above it tokens are drawn with generator, a CPU one.
        Raises ValueError if a prompt ends in padding.
        """
        if mask is not None and not mask[:, -1].all():
            raise ValueError("a prompt ends in padding: generate needs prompts padded on the left")
        cache = KVCache(self.cfg.depth)
        rows, done = [[] for _ in embeds], [False] * len(embeds)
        for _ in range(max_new_tokens):
            logits = self.lm_head(self(embeds, mask, cache, logits_to_keep=1)[:, 0])      # (B, V)
            ids = sample(logits, temperature, generator)                        # (B,)
            for row, new in enumerate(ids.tolist()):
                done[row] = done[row] or extend(rows[row], new, stop)
            if all(done):
                break
            embeds, mask = self.embed(ids[:, None]), None                       # (B, 1, D)
        return rows


def sample(logits, temperature, generator):
    """(B, V) -> ids (B,): the best at temperature 0, otherwise drawn from the softmax."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.float() / temperature).softmax(-1)                  # (B, V)
    # on the CPU, so that one generator serves every device and a seed gives the same tokens on each
    return torch.multinomial(probabilities.cpu(), 1, generator=generator)[:, 0].to(logits.device)


def extend(ids, new, stop):
    """Add the id new to the list ids -> whether the row is complete now (see generate's stop)."""
    if not callable(stop) and new in stop:
        return True
    ids.append(new)
    return callable(stop) and bool(stop(ids))
