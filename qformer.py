"""
The bridge: many patch features (B, N, C) -> few query features (B, Q, E), and the losses that align them with text.

A BERT whose rows are of two kinds. Query rows are learned vectors: they read the video by cross-attention in every
second layer and have a feed-forward network of their own. Text rows are word pieces. Both meet in self-attention.

                  queries (B, Q, E)         text (B, S)
                        |                       |
      x depth    [ self-attention over queries and text together ]
                        |                       |
                  cross-attention <- video      |        every second layer
                        |                       |
                  feed-forward             feed-forward
                        v                       v
                  hidden (B, Q + S, E)

    VTC contrast   queries and text encoded apart: are they near, as vectors?
    VTM matching   queries and text in one pass:   do they belong together?
    VTG generation text after the queries, causal: which word comes next?

Not here: tokenisation (tokenizer.py), the LayerNorm ahead of the queries' input (model.py), processes (infra/distributed.py).

Source: BLIP-2 (arXiv 2301.12597, section 3.1); video_chat2/models/blip2/Qformer.py and videochat2_qformer.py.
Run:    python -m pytest tests/test_qformer.py
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass
class QFormerConfig:
    vocab_size: int = 30523       # 30522 of BERT + [DEC], which opens a generated caption
    width: int = 768
    depth: int = 12
    heads: int = 12
    ffn: int = 3072
    vision_width: int = 1024
    cross_every: int = 2          # cross-attention in layers 0, 2, 4, ...
    max_positions: int = 512
    eps: float = 1e-12
    dropout: float = 0.1
    drop_path: float = 0.2        # of the last layer; rises linearly from 0 in the first
    embed_dim: int = 768          # of the space in which VTC compares
    vtm_cat_text_cls: bool = True  # VTM judges queries and text's first row; False: the queries alone
    label_smoothing: float = 0.1  # of VTG
    init_std: float = 0.02        # 0: 1 / sqrt(width) of each matrix, which lets narrow models learn quicker
    checkpoint_layers: bool = False  # training: recompute each layer in the backward pass instead of storing it

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"Q-Former width {self.width} is no multiple of its {self.heads} heads")

# ----------------------------------------------------------------------------------------------------------------------
# the parts: BERT's, post-norm, under BERT's names

def drop_path(x, p, training):
    """Stochastic depth: zero a sample's whole branch x (B, ..., E) with probability p, scale the others up."""
    if p == 0 or not training:
        return x
    keep = x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(1 - p)           # (B, 1, 1)
    return x * keep / (1 - p)


class Projections(nn.Module):
    def __init__(self, width, source_width):
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(source_width, width)
        self.value = nn.Linear(source_width, width)


class Output(nn.Module):
    """The end of every branch: project, drop, add to the stream x, normalise."""
    def __init__(self, cfg, branch_width, path_rate):
        super().__init__()
        self.dense = nn.Linear(branch_width, cfg.width)
        self.LayerNorm = nn.LayerNorm(cfg.width, eps=cfg.eps)
        self.dropout = nn.Dropout(cfg.dropout)
        self.path_rate = path_rate

    def forward(self, branch, x):
        branch = self.dropout(self.dense(branch))
        return self.LayerNorm(x + drop_path(branch, self.path_rate, self.training))


class Attention(nn.Module):
    def __init__(self, cfg, source_width, path_rate):
        super().__init__()
        self.n_head, self.p = cfg.heads, cfg.dropout
        self.self = Projections(cfg.width, source_width)
        self.output = Output(cfg, cfg.width, path_rate)

    def heads(self, x):
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)               # (B, nh, rows, hs)

    def keys(self, source, past=None):
        """
        What is attended to: keys and values, each (B, nh, keys, hs), of source: of x itself, or of vision (B, N, C);
        past: those that go before.
        """
        k, v = self.heads(self.self.key(source)), self.heads(self.self.value(source))
        return (k, v) if past is None else (torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2))

    def forward(self, x, k, v, mask=None):
        """x (B, rows, E), or (1, rows, E) for all, attends to keys and values. mask (B, 1, 1 or rows, keys) bool."""
        q = self.heads(self.self.query(x)).expand(len(k), -1, -1, -1)           # (B, nh, rows, hs)
        p = self.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)        # (B, nh, rows, hs)
        return self.output(y.transpose(1, 2).flatten(2), x)                     # (B, rows, E)


class Intermediate(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.dense = nn.Linear(cfg.width, cfg.ffn)

    def forward(self, x):
        return F.gelu(self.dense(x))


class Layer(nn.Module):
    def __init__(self, cfg, i):
        super().__init__()
        path_rate = cfg.drop_path * i / max(1, cfg.depth - 1)
        self.attention = Attention(cfg, cfg.width, path_rate)
        self.crossattention = Attention(cfg, cfg.vision_width, path_rate) if i % cfg.cross_every == 0 else None
        self.intermediate, self.output = Intermediate(cfg), Output(cfg, cfg.ffn, path_rate)
        self.intermediate_query, self.output_query = Intermediate(cfg), Output(cfg, cfg.ffn, path_rate)

    def forward(self, hidden, n_query, vision, mask, past=None, texts=None):
        """vision (B, N, C), or the keys and values that this layer has made of it. texts: so many text rows' new state
        is wanted, instead of all. Returns hidden anew and both attentions' keys and values."""
        rows = hidden if texts is None else hidden[:, :n_query + texts]
        kv, seen = self.attention.keys(hidden, past), None
        hidden = self.attention(rows, *kv, mask)                                # (B, Q + S, E)
        query, text = hidden.split((n_query, hidden.shape[1] - n_query), dim=1)  # (B, Q, E), (B, S, E)
        # subtle: a kind that is absent is skipped, not computed on no rows: weights without a gradient must keep
        # grad None, or the optimizer would decay them
        if query.shape[1]:
            if self.crossattention is not None:
                seen = self.crossattention.keys(vision) if torch.is_tensor(vision) else vision
                query = self.crossattention(query, *seen)                       # (B, Q, E)
            query = self.output_query(self.intermediate_query(query), query)    # (B, Q, E)
        if text.shape[1]:
            text = self.output(self.intermediate(text), text)                   # (B, S, E)
        return torch.cat((query, text.expand(len(query), -1, -1)), dim=1), kv, seen     # (B, Q + S, E)


class Embeddings(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.word_embeddings = nn.Embedding(cfg.vocab_size, cfg.width)
        self.position_embeddings = nn.Embedding(cfg.max_positions, cfg.width)
        self.LayerNorm = nn.LayerNorm(cfg.width, eps=cfg.eps)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, query=None, ids=None):                                    # (B, Q, E), (B, S)
        rows = [] if query is None else [query]
        if ids is not None:
            # subtle: text counts from 0 also behind queries, which have no positions
            position = torch.arange(ids.shape[1], device=ids.device)            # (S,)
            rows.append(self.word_embeddings(ids) + self.position_embeddings(position))
        return self.dropout(self.LayerNorm(torch.cat(rows, dim=1)))             # (B, Q + S, E)


class PredictionHead(nn.Module):
    """hidden (B, S, E) -> logits (B, S, V). Its last matrix is the word embeddings', so it is passed in, not kept."""
    def __init__(self, cfg):
        super().__init__()
        self.transform = nn.ModuleDict({
            "dense": nn.Linear(cfg.width, cfg.width),
            "LayerNorm": nn.LayerNorm(cfg.width, eps=cfg.eps),
        })
        self.bias = nn.Parameter(torch.zeros(cfg.vocab_size))

    def forward(self, hidden, word_embeddings):
        hidden = self.transform["LayerNorm"](F.gelu(self.transform["dense"](hidden)))
        return F.linear(hidden, word_embeddings, self.bias)                     # (B, S, V)

# ----------------------------------------------------------------------------------------------------------------------
# the Q-Former

class QFormer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.bert = nn.ModuleDict({
            "embeddings": Embeddings(cfg),
            "encoder": nn.ModuleDict({"layer": nn.ModuleList(Layer(cfg, i) for i in range(cfg.depth))}),
        })
        self.cls = nn.ModuleDict({"predictions": PredictionHead(cfg)})
        self._init_weights()

    def _init_weights(self):
        """Normal with init_std; 0: each matrix by its own width, as narrow models need it to learn quickly."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                own = module.weight.shape[1] ** -0.5
                if ".output" in name:
                    # what all queries read alike adds up; at full strength their cosine is 0.9 before any training
                    own /= (2 * self.cfg.depth) ** 0.5
                nn.init.normal_(module.weight, std=self.cfg.init_std or own)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, query=None, ids=None, mask=None, vision=None, return_kv=False, texts=None):
        """
        query (B, Q, E), ids (B, S) with mask (B, S) 1 = token, vision (B, N, C) -> hidden (B, Q + S, E), query rows
        first; every row sees every other. Either of query and ids may be None; queries need vision. Where all videos
        get the same, query and ids may have a single row: it is computed once, until it has seen the videos.
        texts: so many text rows alone, (B, Q + texts, E): the last layer need not compute the others.
        return_kv adds every layer's keys and values: past, of self-attention, for caption_logits; and seen, of the
        video (None where a layer does not look), for another pass over the same videos, as its vision.
        """
        if query is not None and vision is None:
            raise ValueError("the Q-Former got queries but no vision (B, N, C) for them to read")
        n_query = 0 if query is None else query.shape[1]
        visible = None
        if mask is not None:
            visible = F.pad(mask.bool(), (n_query, 0), value=True)[:, None, None, :]    # (B, 1, 1, Q + S)
        hidden, past, seen = self._layers(self._embed(query, ids), n_query, vision, visible, texts=texts)
        return (hidden, past, seen) if return_kv else hidden                          # (B, Q + S, E)

    def caption_logits(self, ids, mask, past):
        """
        ids, mask (B, S) -> logits (B, S, V): each word sees the words before it, and the queries by their cached keys
        and values past. So queries never see the text, and the video reaches it through them alone.
        """
        S, Q = ids.shape[1], past[0][0].shape[2]
        causal = torch.ones(S, S, dtype=torch.bool, device=ids.device).tril()           # (S, S)
        visible = F.pad(causal & mask.bool()[:, None, :], (Q, 0), value=True)           # (B, S, Q + S)
        hidden, _, _ = self._layers(self._embed(None, ids), 0, None, visible[:, None], past)    # (B, S, E)
        return self.cls["predictions"](hidden, self.bert["embeddings"].word_embeddings.weight)  # (B, S, V)

    def _embed(self, query, ids):
        if ids is not None and ids.shape[1] > self.cfg.max_positions:
            raise ValueError(f"{ids.shape[1]} word pieces, but the Q-Former takes at most {self.cfg.max_positions}")
        return self.bert["embeddings"](query, ids)                              # (B, Q + S, E)

    def _layers(self, hidden, n_query, vision, mask, past=None, texts=None):
        kvs, seen, last = [], [], self.cfg.depth - 1
        recompute = self.cfg.checkpoint_layers and self.training and torch.is_grad_enabled()
        for i, layer in enumerate(self.bert["encoder"]["layer"]):
            args = (hidden, n_query, vision[i] if isinstance(vision, list) else vision, mask,
                    past[i] if past else None, texts if i == last else None)
            hidden, *keys = checkpoint(layer, *args, use_reentrant=False) if recompute else layer(*args)
            for found, new in zip((kvs, seen), keys, strict=True):
                found.append(new)
        return hidden, kvs, seen                                                # (B, Q + S, E)

# ----------------------------------------------------------------------------------------------------------------------
# stage 1: the losses

def similarity(video_feats, text_feats):
    """video_feats (Nv, Q, e), text_feats (Nt, e), unit length -> (Nv, Nt): cosine, averaged over the queries."""
    return video_feats.mean(1) @ text_feats.T                                   # (Nv, e) @ (e, Nt) -> (Nv, Nt)


def vtc_loss(sim, idx):
    """
    Contrast, both ways. sim (B, B) videos x texts over temperature; idx (B,) names the clip, so that a clip that is
    in the batch twice is no negative of itself but shares the target.
    """
    same = (idx[:, None] == idx[None]).float()                                  # (B, B)
    target = same / same.sum(1, keepdim=True)                                   # (B, B), rows sum to 1
    return (F.cross_entropy(sim, target) + F.cross_entropy(sim.T, target)) / 2


def negative_weights(sim, idx):
    """sim (B, B), row = anchor -> chances (B, B): the more alike, the harder and likelier; never of the same idx."""
    same = idx[:, None] == idx[None]                                            # (B, B)
    if same.device.type == "cpu" and same.all(1).any():                         # a GPU would have to be waited for
        raise ValueError(f"matching (VTM) needs for each clip another one in the batch, but the batch of {len(idx)} "
                         f"holds a single clip, idx {idx[0].item()}: use a larger batch")
    return (sim.float().softmax(1) + 1e-4).masked_fill(same, 0)


@torch.no_grad()
def hard_negatives(sim, idx, generator=None):
    """
    sim (B, B) videos x texts -> (videos (B,) to go wrongly with each text, texts (B,) with each video). Drawn with the
    CPU torch.Generator, videos first. Raises ValueError if the batch holds one clip only.
    """
    weights = negative_weights(sim.T, idx), negative_weights(sim, idx)          # (B, B) text x video, video x text
    return tuple(draw(w, generator) for w in weights)                           # (B,), (B,)


def draw(weights, generator):
    """One place of each row, by chances that need not sum to 1, (B, n) -> (B,). As torch.multinomial, but the random
    numbers are the CPU's, so that one generator serves every device, and a GPU's weights stay there.
    """
    # pinned: before it reads other memory, a GPU ends what it has begun
    noise = torch.empty(weights.shape, pin_memory=weights.is_cuda).exponential_(generator=generator)    # (B, n)
    return (weights / noise.to(weights.device, non_blocking=True)).argmax(1)


def vtg_loss(logits, ids, mask, label_smoothing):
    """Next word: logits (B, S, V), ids and mask (B, S) -> mean cross-entropy over all words but each row's first."""
    target = ids.masked_fill(mask == 0, -100)[:, 1:]                            # (B, S - 1)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), target.flatten(), label_smoothing=label_smoothing)


def thrice(vision, pool, videos):
    """vision (B, N, C) of true pairs, of pairs with another video, of pairs with another text -> (3 * B, N, C). Of each
    layer's keys and values alike, where they are given instead."""
    if torch.is_tensor(vision):
        return torch.cat((vision, pool[videos], vision))
    return [kv and tuple(torch.cat((t, t.index_select(0, videos), t)) for t in kv) for kv in vision]


class Alone:
    """Who else has a part of the batch: nobody. Among several processes a parallel.World takes its place."""
    @staticmethod
    def all_gather(x):
        """Rows of this process -> rows of the joint batch, with gradients."""
        return x

    @staticmethod
    def local_rows(x):
        """Rows of the joint batch -> those of this process."""
        return x

    @staticmethod
    def most(n):
        """The largest of all processes' numbers."""
        return n


class Stage1Heads(nn.Module):
    """
    The heads of stage 1, dropped afterwards. Its methods borrow the Q-Former that they train, and take query_tokens
    (1, Q, E), vision (B, N, C), ids and mask (B, S).
    """
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.vision_proj = nn.Linear(cfg.width, cfg.embed_dim)
        self.text_proj = nn.Linear(cfg.width, cfg.embed_dim)
        self.itm_head = nn.Linear(2 * cfg.width if cfg.vtm_cat_text_cls else cfg.width, 2)
        self.temp = nn.Parameter(torch.tensor(0.07))

    def temperature(self):
        """
        temp within [0.001, 0.5]. The official code clamps the parameter itself in every forward pass
        (videochat2_qformer.py:229); here no pass changes a weight, and the gradient goes through as it does there.
        """
        return self.temp.detach().clamp(0.001, 0.5) + (self.temp - self.temp.detach())

    def video_features(self, hidden):
        """Query rows (B, Q, E) -> (B, Q, e) of unit length."""
        return F.normalize(self.vision_proj(hidden), dim=-1)

    def text_features(self, hidden):
        """Text rows (B, S, E), of which the first stands for all -> (B, e) of unit length."""
        return F.normalize(self.text_proj(hidden[:, 0]), dim=-1)

    def match_logits(self, qformer, query_tokens, vision, ids, mask):
        """-> (B, 2): 1 says that video and text belong together, 0 that they do not."""
        Q = query_tokens.shape[1]
        query = query_tokens.expand(len(ids), -1, -1)                               # (B, Q, E)
        hidden = qformer(query, ids, mask, vision, texts=1)                         # (B, Q + 1, E)
        pooled = hidden[:, :Q].mean(1)                                              # (B, E)
        if self.cfg.vtm_cat_text_cls:
            pooled = torch.cat((pooled, hidden[:, Q]), dim=-1)                      # (B, 2*E)
        return self.itm_head(pooled)                                                # (B, 2)

    def match_scores(self, qformer, query_tokens, vision, ids, mask):
        """-> (B,): the logit of a match, by which retrieval ranks its best candidates again."""
        return self.match_logits(qformer, query_tokens, vision, ids, mask)[:, 1]    # (B,)

    def vtm_loss(self, qformer, query_tokens, vision, ids, mask, negatives, pool=None):
        """
        B true pairs, B with another video, B with another text; negatives as hard_negatives gives them: places in
        pool = (vision, ids, mask) of the joint batch, or in the batch itself. Without a pool, vision may be what a pass
        has seen of it.
        """
        (videos, texts), (all_vision, *all_texts) = negatives, pool or (vision, ids, mask)
        vision = thrice(vision, all_vision, videos)                                 # (3*B, N, C)
        ids, mask = (torch.cat((t, t, al[texts])) for t, al in zip((ids, mask), all_texts, strict=True))    # (3*B, S)
        logits = self.match_logits(qformer, query_tokens, vision, ids, mask)        # (3*B, 2)
        match = torch.zeros(len(logits), dtype=torch.long, device=logits.device)    # (3*B,)
        match[:len(logits) // 3] = 1
        return F.cross_entropy(logits, match)

    def losses(self, qformer, query_tokens, vision, ids, mask, idx, dec_id, generator=None, negatives=None,
               captions_only=False, everyone=Alone, global_negatives=False):
        """
        {"vtc", "vtm", "vtg"}, to be added with equal weights; captions_only: {"vtg"} alone. ids open with [CLS];
        idx (B,) names each row's clip; dec_id takes [CLS]'s place for generation. negatives replaces the drawn ones.
        Contrast is over the batch of all processes; matching draws its negatives from this process's, as officially,
        or, with global_negatives, from all. Raises ValueError if the batch holds one clip only.
        """
        query = query_tokens.expand(len(ids), -1, -1)                               # (B, Q, E)
        video, past, seen = qformer(query, vision=vision, return_kv=True)         # (B, Q, E)
        dec_ids = torch.cat((torch.full_like(ids[:, :1], dec_id), ids[:, 1:]), dim=1)   # (B, S)
        logits = qformer.caption_logits(dec_ids, mask, past)                            # (B, S, V)
        vtg = vtg_loss(logits, dec_ids, mask, self.cfg.label_smoothing)
        if captions_only:
            return {"vtg": vtg}
        text = qformer(ids=ids, mask=mask, texts=1)                                 # (B, 1, E)
        video_feats = everyone.all_gather(self.video_features(video).mean(1, keepdim=True))     # (all B, 1, e)
        text_feats, all_idx = everyone.all_gather(self.text_features(text)), everyone.all_gather(idx)   # (all B, e), (all B,)
        sim = similarity(video_feats, text_feats) / self.temperature()              # (all B, all B)
        pool = None
        if global_negatives:
            longer = max(everyone.all_gather_object(ids.shape[1])) - ids.shape[1]
            ids, mask = F.pad(ids, (0, longer)), F.pad(mask, (0, longer))           # [PAD] is 0
            pool = tuple(everyone.all_gather(t) for t in (vision, ids, mask))
            negatives = tuple(everyone.local_rows(t) for t in hard_negatives(sim, all_idx, generator))
        elif negatives is None:
            negatives = hard_negatives(everyone.local_rows(everyone.local_rows(sim).T).T, idx, generator)
        return {
            "vtc": vtc_loss(sim, all_idx),
            # the video's keys and values are the dearest part, and the same in each pass
            "vtm": self.vtm_loss(qformer, query_tokens, vision if pool else seen, ids, mask, negatives, pool),
            "vtg": vtg,
        }
