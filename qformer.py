"""The Q-Former: many patch features (B, N, C) -> few query features (B, Q, E); the losses that align them with text.

A BERT with two kinds of rows. Query rows are learned vectors: they read the video by cross-attention in every second
layer and have a feed-forward network of their own. Text rows are word pieces. Both meet in self-attention.

                 queries (B, Q, E)         text (B, S)
               [ self-attention of queries and text together ]
       x depth [ cross-attention <- video       |            ]     every second layer
               [ feed-forward              feed-forward      ]
                 hidden (B, Q + S, E)

    VTC contrast   queries and text encoded separately: are they similar, as vectors?
    VTM matching   queries and text in one pass:        do they belong together?
    VTG generation text after the queries, causal:      which word comes next?

Not here: tokenisation (tokenizer.py), the LayerNorm before the Q-Former (model.py), processes (infra/distributed.py).

Source: BLIP-2 (arXiv 2301.12597, section 3.1); video_chat2/models/blip2/Qformer.py and videochat2_qformer.py.
Run:    python -m pytest tests/test_qformer.py
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

VTM_TEXT_CLS = ("cat", "add", "none")          # see Stage1Heads

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
    label_smoothing: float = 0.1  # of VTG
    init_std: float = 0.02        # 0: by the inputs of each matrix (vit_video.ViTConfig)
    checkpoint_layers: bool = False  # training: recompute each layer in the backward pass instead of storing it

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"Q-Former width {self.width} is not a multiple of its {self.heads} heads")

# --------------------------------------------------------------------- the parts: BERT's, post-norm, under BERT's names

def drop_path(x, p, training):
    """Stochastic depth: zero the whole branch x (B, ..., E) of a sample with probability p, scale the others up."""
    if p == 0 or not training:
        return x
    survives = x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(1 - p)       # (B, 1, 1)
    return x * survives / (1 - p)

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
        self.self = nn.ModuleDict({
            "query": nn.Linear(cfg.width, cfg.width),
            "key": nn.Linear(source_width, cfg.width),
            "value": nn.Linear(source_width, cfg.width),
        })
        self.output = Output(cfg, cfg.width, path_rate)

    def heads(self, x):
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)               # (B, nh, rows, hs)

    def project_kv(self, source, past_kv=None):
        """x or vision (B, N, C) -> its keys and values, (B, nh, keys, hs) each, after those of past_kv."""
        kv = self.heads(self.self["key"](source)), self.heads(self.self["value"](source))
        return kv if past_kv is None else tuple(torch.cat(pair, dim=2) for pair in zip(past_kv, kv, strict=True))

    def forward(self, x, kv, mask=None):
        """x (B, rows, E), or (1, rows, E) for all, attends to kv. mask (B, 1, 1 or rows, keys): True may be seen."""
        k, v = kv
        q = self.heads(self.self["query"](x)).expand(len(k), -1, -1, -1)        # (B, nh, rows, hs)
        p = self.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)    # (B, nh, rows, hs)
        return self.output(y.transpose(1, 2).flatten(2), x)                     # (B, rows, E)

class Layer(nn.Module):
    def __init__(self, cfg, layer_idx):
        super().__init__()
        path_rate = cfg.drop_path * layer_idx / max(1, cfg.depth - 1)
        self.attention = Attention(cfg, cfg.width, path_rate)
        self.crossattention = Attention(cfg, cfg.vision_width, path_rate) if layer_idx % cfg.cross_every == 0 else None
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(cfg.width, cfg.ffn)})
        self.output = Output(cfg, cfg.ffn, path_rate)
        self.intermediate_query = nn.ModuleDict({"dense": nn.Linear(cfg.width, cfg.ffn)})
        self.output_query = Output(cfg, cfg.ffn, path_rate)

    def forward(self, hidden, n_query, mask, vision, cross_kv, past_kv, n_text_out):
        """hidden (B, Q + S, E), n_query = Q -> the same, self_kv, cross_kv. The arguments are QFormer.forward's."""
        # self-attention of queries and text, and of rows cached before them
        rows = hidden if n_text_out is None else hidden[:, :n_query + n_text_out]
        self_kv = self.attention.project_kv(hidden, past_kv)                    # 2 x (B, nh, past + Q + S, hs)
        hidden = self.attention(rows, self_kv, mask)                            # (B, Q + S, E)
        query, text = hidden.split((n_query, hidden.shape[1] - n_query), dim=1)  # (B, Q, E), (B, S, E)

        # subtle: absent queries or text are skipped, not computed on no rows: weights without a gradient must keep
        # grad None, or the optimizer would decay them
        if query.shape[1]:
            if self.crossattention is not None:
                cross_kv = cross_kv or self.crossattention.project_kv(vision)   # 2 x (B, nh, N, hs)
                query = self.crossattention(query, cross_kv)                    # (B, Q, E)
            query = self.output_query(F.gelu(self.intermediate_query["dense"](query)), query)   # (B, Q, E)
        if text.shape[1]:
            text = self.output(F.gelu(self.intermediate["dense"](text)), text)  # (B, S, E)
        hidden = torch.cat((query, text.expand(len(query), -1, -1)), dim=1)     # (B, Q + S, E)
        return hidden, self_kv, cross_kv

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
            S, limit = ids.shape[1], self.position_embeddings.num_embeddings
            if S > limit:
                raise ValueError(f"{S} word pieces, but the Q-Former takes at most {limit}: shorten the text")
            # subtle: text counts from 0 even after queries, which have no positions
            rows.append(self.word_embeddings(ids) + self.position_embeddings.weight[:S])    # (B, S, E)
        return self.dropout(self.LayerNorm(torch.cat(rows, dim=1)))             # (B, Q + S, E)

class PredictionHead(nn.Module):
    """hidden (B, S, E) -> logits (B, S, V). Its last matrix is that of the word embeddings, passed in."""
    def __init__(self, cfg):
        super().__init__()
        E = cfg.width
        self.transform = nn.ModuleDict({"dense": nn.Linear(E, E), "LayerNorm": nn.LayerNorm(E, eps=cfg.eps)})
        self.bias = nn.Parameter(torch.zeros(cfg.vocab_size))

    def forward(self, hidden, word_embeddings):
        hidden = self.transform["LayerNorm"](F.gelu(self.transform["dense"](hidden)))
        return F.linear(hidden, word_embeddings, self.bias)                     # (B, S, V)

# --------------------------------------------------------------------------------------------------------- the Q-Former

class QFormer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.bert = nn.ModuleDict({
            "embeddings": Embeddings(cfg),
            "encoder": nn.ModuleDict({"layer": nn.ModuleList(Layer(cfg, i) for i in range(cfg.depth))}),
        })
        self.cls = nn.ModuleDict({"predictions": PredictionHead(cfg)})

        # initial weights. What all queries read alike adds up: if the outputs had no smaller std, two queries' cosine
        # would be 0.9 before any training
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                std = module.weight.shape[1] ** -0.5 / ((2 * cfg.depth) ** 0.5 if ".output" in name else 1)
                nn.init.normal_(module.weight, std=cfg.init_std or std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, query=None, ids=None, mask=None, vision=None, cross_kv=None, n_text_out=None, return_kv=False):
        """query (B, Q, E), ids (B, S) with mask (B, S) 1 = token, vision (B, N, C) -> hidden (B, Q + S, E), query rows
        first; every row sees all others. query or ids may be None, and may have one row for all videos, which is then
        computed once, up to the first cross-attention. n_text_out: return, and compute, this many text rows only.
        return_kv: -> (hidden, self_kv, cross_kv), one (keys, values) per layer: self_kv for caption_logits, cross_kv
        for another pass over the same videos, where it replaces vision (None in layers without).
        Raises ValueError for queries without vision or cross_kv, and for more ids than cfg.max_positions."""
        if query is not None and vision is None and cross_kv is None:
            raise ValueError("the Q-Former got queries but no vision (B, N, C) for them to read")

        # queries are never padding
        n_query = 0 if query is None else query.shape[1]
        if mask is not None:
            mask = F.pad(mask.bool(), (n_query, 0), value=True)[:, None, None, :]   # (B, 1, 1, Q + S)
        hidden = self.bert["embeddings"](query, ids)                            # (B, Q + S, E)
        hidden, *kv = self._layers(hidden, n_query, mask, vision, cross_kv, n_text_out=n_text_out)
        return (hidden, *kv) if return_kv else hidden                           # (B, Q + S, E)

    def caption_logits(self, ids, mask, past_kv):
        """ids, mask (B, S) -> logits (B, S, V). Each word sees the words before it, and the queries by past_kv, the
        self_kv of their own pass. They never see the text, so they alone carry the video to it."""
        S, Q = ids.shape[1], past_kv[0][0].shape[2]
        causal = torch.ones(S, S, dtype=torch.bool, device=ids.device).tril()   # (S, S)
        visible = F.pad(causal & mask.bool()[:, None, :], (Q, 0), value=True)   # (B, S, Q + S)
        hidden = self.bert["embeddings"](ids=ids)                               # (B, S, E)
        hidden, _, _ = self._layers(hidden, 0, visible[:, None], past_kv=past_kv)   # (B, S, E)
        return self.cls["predictions"](hidden, self.bert["embeddings"].word_embeddings.weight)  # (B, S, V)

    def _layers(self, hidden, n_query, mask, vision=None, cross_kv=None, past_kv=None, n_text_out=None):
        """hidden (B, Q + S, E) through all layers -> hidden, and each layer's self_kv and cross_kv."""
        layers, all_kv = self.bert["encoder"]["layer"], []
        recompute = self.cfg.checkpoint_layers and self.training and torch.is_grad_enabled()
        for i, layer in enumerate(layers):
            args = (hidden, n_query, mask, vision, cross_kv and cross_kv[i], past_kv and past_kv[i],
                    n_text_out if i == len(layers) - 1 else None)
            hidden, *kv = checkpoint(layer, *args, use_reentrant=False) if recompute else layer(*args)
            all_kv.append(kv)
        return hidden, *zip(*all_kv, strict=True)

# -------------------------------------------------------------------------------------------------- stage 1: the losses

def similarity(video_feats, text_feats):
    """video_feats (Nv, Q, e), text_feats (Nt, e), unit length -> (Nv, Nt): cosine, averaged over the queries."""
    return video_feats.mean(1) @ text_feats.T                                   # (Nv, e) @ (e, Nt) -> (Nv, Nt)

def vtc_loss(sim, idx):
    """Contrast, both ways. sim (B, B) videos x texts over temperature; idx (B,): equal clips share the target."""
    same = (idx[:, None] == idx[None]).float()                                  # (B, B)
    target = same / same.sum(1, keepdim=True)                                   # (B, B), rows sum to 1
    return (F.cross_entropy(sim, target) + F.cross_entropy(sim.T, target)) / 2

def negative_weights(sim, idx):
    """sim (B, B), row = anchor -> weights (B, B) of negatives: the more similar the likelier, the same clip never."""
    same = idx[:, None] == idx[None]                                            # (B, B)
    if same.device.type == "cpu" and same.all(1).any():                         # asking a GPU would sync it
        raise ValueError(f"VTM needs other clips, but the batch of {len(idx)} holds a single clip, idx {idx[0].item()}")
    return (sim.float().softmax(1) + 1e-4).masked_fill(same, 0)

@torch.no_grad()
def hard_negatives(sim, idx, generator=None):
    """sim (B, B) videos x texts -> (a wrong video for each text (B,), a wrong text for each video (B,)), drawn in this
    order with the CPU torch.Generator. Raises ValueError if the batch holds one clip only."""
    rows = []
    for weights in (negative_weights(sim.T, idx), negative_weights(sim, idx)):  # (B, B), row = anchor
        # torch.multinomial, but with the CPU's random numbers, so that one generator serves every device; the weights
        # stay on the GPU, and pinned memory is copied without a sync
        noise = torch.empty(weights.shape, pin_memory=weights.is_cuda).exponential_(generator=generator)    # (B, B)
        rows.append((weights / noise.to(weights.device, non_blocking=True)).argmax(1))      # (B,)
    return tuple(rows)

def vtg_loss(logits, ids, mask, label_smoothing):
    """Next word: logits (B, S, V), ids and mask (B, S) -> mean cross-entropy over all words but each row's first."""
    target = ids.masked_fill(mask == 0, -100)[:, 1:].contiguous()               # (B, S - 1)
    # without a word the mean would be nan, also times 0: it is then that of one padding, which no step counts
    target[0, 0] = torch.where(mask[:, 1:].any(), target[0, 0], ids[0, 1])
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), target.flatten(), label_smoothing=label_smoothing)

class Stage1Heads(nn.Module):
    """The heads of stage 1, dropped afterwards. Q-Former and queries are arguments, so their weights register once.

    vtm_text_cls: what VTM classifies besides the mean of the query rows. Source: videochat2_qformer.py, vtm_embed.
        cat      the text's first row, [CLS], after it      add      the sum of both      none     nothing"""
    def __init__(self, cfg, vtm_text_cls):
        super().__init__()
        if vtm_text_cls not in VTM_TEXT_CLS:
            raise ValueError(f"vtm_text_cls {vtm_text_cls!r}: expected one of {', '.join(VTM_TEXT_CLS)}")
        self.cfg, self.vtm_text_cls = cfg, vtm_text_cls
        self.vision_proj = nn.Linear(cfg.width, cfg.embed_dim)
        self.text_proj = nn.Linear(cfg.width, cfg.embed_dim)
        self.itm_head = nn.Linear(2 * cfg.width if vtm_text_cls == "cat" else cfg.width, 2)
        self.temp = nn.Parameter(torch.tensor(0.07))

    def temperature(self):
        """temp in [0.001, 0.5] with its gradient; the official code clamps temp itself (videochat2_qformer.py:229)."""
        return self.temp.detach().clamp(0.001, 0.5) + (self.temp - self.temp.detach())

    def video_features(self, hidden):
        """Query rows (B, Q, E) -> (B, Q, e) of unit length."""
        return F.normalize(self.vision_proj(hidden), dim=-1)

    def text_features(self, hidden):
        """Text rows (B, S, E), of which the first stands for all -> (B, e) of unit length."""
        return F.normalize(self.text_proj(hidden[:, 0]), dim=-1)

    def itm_logits(self, qformer, query_tokens, ids, mask, vision=None, cross_kv=None):
        """Texts (B, S) and videos, vision (B, N, C) or cross_kv -> (B, 2): column 1 says that they match."""
        Q = query_tokens.shape[1]
        query = query_tokens.expand(len(ids), -1, -1)                           # (B, Q, E)
        hidden = qformer(query, ids, mask, vision, cross_kv, n_text_out=1)      # (B, Q + 1, E)
        pooled = hidden[:, :Q].mean(1)                                          # (B, E)
        if self.vtm_text_cls == "cat":
            pooled = torch.cat((pooled, hidden[:, Q]), dim=-1)                  # (B, 2*E)
        elif self.vtm_text_cls == "add":
            pooled = pooled + hidden[:, Q]                                      # (B, E)
        return self.itm_head(pooled)                                            # (B, 2)

    def losses(self, qformer, query_tokens, vision, batch, dec_id, dist, generator=None, vtg_only=False,
               global_negatives=False):
        """{"vtc", "vtm", "vtg"}, to be added with equal weights; with vtg_only {"vtg"} alone. vision (B, N, C), batch:
        ids, mask (B, S), opening with [CLS], and idx (B,), which names the clips. [DEC], dec_id, replaces it in VTG.
        dist: infra.distributed.Distributed. VTC is over the batch of all processes. VTM draws its negatives from this
        process's rows, as the official code does, or, global_negatives, from all. ValueError for one clip."""
        # the queries read the video; VTG and VTM reuse the keys and values of this pass
        ids, mask, idx = batch["ids"], batch["mask"], batch["idx"]
        query = query_tokens.expand(len(ids), -1, -1)                           # (B, Q, E)
        video, self_kv, cross_kv = qformer(query, vision=vision, return_kv=True)    # (B, Q, E)

        # VTG: the caption, word by word
        dec_ids = torch.cat((torch.full_like(ids[:, :1], dec_id), ids[:, 1:]), dim=1)   # (B, S)
        vtg = vtg_loss(qformer.caption_logits(dec_ids, mask, self_kv), dec_ids, mask, self.cfg.label_smoothing)
        if vtg_only:
            return {"vtg": vtg}

        # VTC: all videos with all texts, of all processes
        text = qformer(ids=ids, mask=mask, n_text_out=1)                        # (B, 1, E)
        video_feats = dist.all_gather(self.video_features(video).mean(1, keepdim=True))     # (all B, 1, e)
        text_feats, all_idx = dist.all_gather(self.text_features(text)), dist.all_gather(idx)   # (all B, e), (all B,)
        sim = similarity(video_feats, text_feats) / self.temperature()          # (all B, all B)

        # VTM: a wrong video for each text, a wrong text for each video, from all processes or from this one
        if global_negatives:
            longest = max(dist.all_gather_object(ids.shape[1]))
            ids, mask = (F.pad(t, (0, longest - t.shape[1])) for t in (ids, mask))      # [PAD] is 0
            all_vision, all_ids, all_mask = (dist.all_gather(t) for t in (vision, ids, mask))
            videos, texts = (dist.local_rows(rows) for rows in hard_negatives(sim, all_idx, generator))  # (B,), (B,)
            vision, cross_kv = torch.cat((vision, all_vision[videos], vision)), None    # (3*B, N, C)
        else:
            all_ids, all_mask, vision = ids, mask, None
            local_sim = dist.local_rows(dist.local_rows(sim).T).T               # (B, all B) -> (B, B)
            videos, texts = hard_negatives(local_sim, idx, generator)           # (B,), (B,)
            # the first pass has projected these videos; keys and values (3*B, nh, N, hs), None in layers without
            cross_kv = [kv and tuple(torch.cat((t, t.index_select(0, videos), t)) for t in kv) for kv in cross_kv]

        # VTM: B true pairs, B with a wrong video, B with a wrong text
        ids, mask = torch.cat((ids, ids, all_ids[texts])), torch.cat((mask, mask, all_mask[texts]))     # (3*B, S)
        logits = self.itm_logits(qformer, query_tokens, ids, mask, vision, cross_kv)    # (3*B, 2)
        is_match = (torch.arange(len(ids), device=ids.device) < len(idx)).long()        # (3*B,)
        return {"vtc": vtc_loss(sim, all_idx), "vtm": F.cross_entropy(logits, is_match), "vtg": vtg}
