"""What the text half of the toy's Q-Former is pretrained on: to write a caption that its queries have read as text.

    CaptionAutoencoder: caption -> cross-attention -> queries (B, Q, E) -> the same caption, word by word
                        caption with hidden words ->                       the hidden words, as BERT does

The official Q-Former starts from bert-base, and so knows the language before it sees a video. This one has even written
from queries; what they learn here, and the cross-attention, is dropped. Not here: the command (toy/pretrain.py).
Source of the idea: BERT (arXiv 1810.04805); BLIP-2 (arXiv 2301.12597), section 3.2.

    python -m toy.pretrain bert
"""
import json
import random
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from prompt import pad_ids
from qformer import QFormer, vtg_loss

class CaptionAutoencoder(nn.Module):
    """A Q-Former whose video is the caption itself."""

    def __init__(self, cfg, mask_id):
        super().__init__()
        E = cfg.qformer.width
        self.mask_id, self.qformer = mask_id, QFormer(replace(cfg.qformer, vision_width=E))
        self.query_tokens = nn.Parameter(torch.empty(1, cfg.n_query, E).normal_(std=0.02))
        self.places = nn.Parameter(torch.empty(cfg.align_text, E).normal_(std=0.5))
        self.norm = nn.LayerNorm(E)

    def losses(self, batch):
        """ids, mask (B, S) -> {"vtg": of the captions from the queries, "mlm": of words hidden in them}."""
        # queries read the words as if they were patches
        ids, mask, embeddings = batch["ids"], batch["mask"], self.qformer.bert["embeddings"].word_embeddings
        words = F.pad(embeddings(ids), (0, 0, 0, len(self.places) - ids.shape[1]))             # (B, align_text, E)
        query = self.query_tokens.expand(len(ids), -1, -1)                                     # (B, Q, E)
        _, kv, _ = self.qformer(query, vision=self.norm(words + self.places), return_kv=True)
        losses = {"vtg": vtg_loss(self.qformer.caption_logits(ids, mask, kv), ids, mask, label_smoothing=0.0)}

        # three words in ten are hidden; the text alone, read in both directions, tells some of them
        hidden_words = (torch.rand(ids.shape, device=ids.device) < 0.3) & mask.bool()          # (B, S)
        hidden = self.qformer(ids=ids.masked_fill(hidden_words, self.mask_id), mask=mask)      # (B, S, E)
        logits = self.qformer.cls["predictions"](hidden[hidden_words], embeddings.weight)      # (n, V)
        mlm = F.cross_entropy(logits, ids[hidden_words], reduction="sum") / max(1, len(logits))
        return losses | {"mlm": 0.3 * mlm}

def text_half(tensors):
    """{name: tensor} of a CaptionAutoencoder -> the Q-Former's that bert-base has, too."""
    return {name: t for name, t in tensors.items()
            if name.startswith("qformer.") and "crossattention" not in name and "_query." not in name}

class Captions(torch.utils.data.Dataset):
    """Captions of text.jsonl, drawn at random."""

    def __init__(self, path, epoch_size):
        self.captions, self.epoch_size, self.epoch = [json.loads(line)[0] for line in open(path)], epoch_size, 0

    def __len__(self):
        return self.epoch_size

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, index):
        return random.Random(f"{self.epoch} {index}").choice(self.captions)

def collate_captions(captions, tok, max_text):
    """-> ids (B, S) that begin with [DEC] and end with [SEP], mask (B, S)."""
    rows = [[tok.dec_id, *tok.encode(caption, max_text, sep=True)[1:]] for caption in captions]
    ids, mask = pad_ids(rows, tok.pad_id)
    return {"ids": ids, "mask": mask, "bad": []}
