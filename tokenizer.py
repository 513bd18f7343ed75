"""Text to ids: WordPiece, written by hand, for the Q-Former; SentencePiece for the LLM.

    "a red kite"  --WordPiece-->      [CLS] a red kit ##e      as for BERT: lower case, words split greedily
                  --SentencePiece-->  ▁a ▁red ▁k ite           as for LLaMA: a space starts a piece

VideoChat2 adds one token to BERT's, [DEC], which starts a caption to be generated. SentencePiece is the library of that
name; literal <s>, </s> and <unk> are split off first. Not here: prompts, labels and padding (prompt.py).

Source: BERT uncased (arXiv 1810.04805; google-research/bert, tokenization.py); transformers 4.40.1, LlamaTokenizer.
Run:    python -m pytest tests/test_tokenizer.py
"""
import io
import re
import unicodedata
from collections import Counter
from pathlib import Path

import sentencepiece

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]  # in every BERT vocabulary
DEC = "[DEC]"                                              # added by VideoChat2 at the end: id 30522 of 30523
MAX_WORD = 100                                             # characters; a longer word becomes one [UNK]
SPACE = "▁"                                                # how SentencePiece writes a space
LITERALS = re.compile("(<s>|</s>|<unk>)")                  # special tokens when SentencePiece reads them in a text
CJK = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # unified ideographs, extensions A-E, compatibility
                 "\U00020000-\U0002a6df\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f]")

# ------------------------------------------------------------------------------------------------------------ WordPiece

class WordPiece:
    """The Q-Former's tokenizer. `vocab` lists the pieces in the order of their ids; "##" continues a word."""
    def __init__(self, vocab):
        if missing := [name for name in SPECIALS if name not in vocab]:
            raise ValueError(f"vocabulary of {len(vocab)} entries lacks {' '.join(missing)}")
        self.pieces = list(vocab) + ([] if DEC in vocab else [DEC])
        self.vocab_size = len(self.pieces)
        self.id_of = {piece: i for i, piece in enumerate(self.pieces)}
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (self.id_of[name] for name in SPECIALS)
        self.dec_id = self.id_of[DEC]
        self.specials = re.compile("(" + "|".join(map(re.escape, [*SPECIALS, DEC])) + ")")

    @classmethod
    def load(cls, path):
        """Reads a vocab.txt, one piece per line. Raises FileNotFoundError or ValueError with the file's name."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such WordPiece vocabulary (vocab.txt)")
        try:
            # subtle: not splitlines(), which also splits at rare Unicode line separators that BERT's list may contain
            return cls(path.read_text(encoding="utf-8").rstrip("\n").split("\n"))
        except ValueError as error:
            raise ValueError(f"{path}: not a WordPiece vocabulary: {error}") from None

    def encode(self, text, max_length=None, sep=False, truncate="right"):
        """Ids of `[CLS] w1 .. wn`, then `[SEP]` if `sep`; at most `max_length` ids, cut at the side `truncate`.

        # QUIRK models/bert/tokenization_bert.py:264-265: stage 1 reads captions without [SEP]; stages 2 and 3 read the
        # instruction with it, and cut a long one on the left."""
        # a literal [SEP] or [DEC] in the text is that token; all other text is words, and words are pieces
        ids = []
        for chunk in self.specials.split(text):
            if chunk == DEC or chunk in SPECIALS:
                ids.append(self.id_of[chunk])
            else:
                ids += [i for word in basic_tokenize(chunk) for i in self.wordpiece(word)]

        # [CLS] and [SEP] always stay
        ends = [self.sep_id] if sep else []
        if max_length is not None:
            n = max(max_length - 1 - len(ends), 0)
            ids = ids[:n] if truncate == "right" else ids[max(len(ids) - n, 0):]
        return [self.cls_id, *ids, *ends]

    def wordpiece(self, word):
        """Ids of a word: the longest piece it starts with, the longest "##" piece of the rest, ...; else one [UNK]."""
        if len(word) > MAX_WORD:
            return [self.unk_id]
        ids, start = [], 0
        while start < len(word):
            prefix = "##" if start else ""
            matches = (end for end in range(len(word), start, -1) if prefix + word[start:end] in self.id_of)
            end = next(matches, None)
            if end is None:
                return [self.unk_id]
            ids.append(self.id_of[prefix + word[start:end]])
            start = end
        return ids

def basic_tokenize(text):
    """BERT's basic tokenisation into words: "Don't blink, Zoë" -> don ' t blink , zoe"""
    # control characters and U+FFFD vanish; white space becomes a space, a Chinese character a word of its own
    visible = (c for c in text if c in "\t\n\r" or c != "\ufffd" and not unicodedata.category(c).startswith("C"))
    spaced = CJK.sub(r" \g<0> ", "".join(" " if c.isspace() else c for c in visible))
    words = []
    for word in unicodedata.normalize("NFC", spaced).split():
        # accents are combining marks (category Mn) once a letter is decomposed
        plain = "".join(c for c in unicodedata.normalize("NFD", word.lower()) if unicodedata.category(c) != "Mn")
        words += "".join(f" {c} " if is_punctuation(c) else c for c in plain).split()
    return words

def is_punctuation(c):
    """Unicode's punctuation, and the ASCII signs that Unicode counts as symbols, such as $ and ^."""
    return unicodedata.category(c).startswith("P") or (c.isascii() and c.isprintable() and not c.isalnum() and c != " ")

def train_wordpiece(texts, path):
    """Writes a vocab.txt: specials, all words of `texts` (most frequent first), single characters, alone and as ##."""
    count = Counter(word for text in texts for word in basic_tokenize(text))
    letters = sorted({c for word in count for c in word})
    by_count = sorted(count, key=lambda word: (-count[word], word))
    vocab = dict.fromkeys([*SPECIALS, *by_count, *letters, *("##" + c for c in letters)])
    Path(path).write_text("\n".join(vocab) + "\n", encoding="utf-8")

# -------------------------------------------------------------------------------------------------------- SentencePiece

class SentencePiece:
    """The LLM's tokenizer, from a tokenizer.model as LLaMA's. <s> and </s> are added only on request."""
    def __init__(self, path):
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such SentencePiece model (tokenizer.model)")
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except RuntimeError:
            raise ValueError(f"{path}: not a SentencePiece model, or a damaged one") from None
        self.unk_id, self.bos_id, self.eos_id = self.model.unk_id(), self.model.bos_id(), self.model.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError(f"{path}: has no <s> or no </s>, so it is not a tokenizer of the LLaMA family")
        self.vocab_size = len(self.model)
        self.special = {"<s>": self.bos_id, "</s>": self.eos_id, "<unk>": self.unk_id}

    def encode(self, text, bos=False, eos=False):
        """Ids of `text`; bos, eos: with <s> before it, </s> after it."""
        ids = []
        for chunk in LITERALS.split(text):
            ids += [self.special[chunk]] if chunk in self.special else self.model.encode(chunk) if chunk else []
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_with_ends(self, text):
        """-> ids, and for each the index of its last character in `text`; so labels can follow the text (prompt.py)."""
        ids, ends, start = [], [], 0                           # start: of the chunk in `text`
        for chunk in LITERALS.split(text):
            if chunk in self.special:
                ids.append(self.special[chunk])
                ends.append(start + len(chunk) - 1)
            elif chunk:
                # count in bytes, since one character can be several byte pieces
                # subtle: SentencePiece adds a space before every chunk, also after <s>: byte 0, of the first character
                char_of_byte = [0] + [i for i, c in enumerate(chunk) for _ in c.replace(SPACE, " ").encode()]
                n_bytes = 0
                for piece in self.model.encode(chunk, out_type=str):
                    ids.append(self.model.piece_to_id(piece))
                    n_bytes += 1 if self.model.is_byte(ids[-1]) else len(piece.replace(SPACE, " ").encode())
                    ends.append(start + char_of_byte[n_bytes - 1])
            start += len(chunk)
        return ids, ends

    def decode(self, ids):
        """Text of `ids`, without <s>, </s> and the ids that an LLM has beyond its tokenizer's pieces."""
        return self.model.decode([i for i in ids if i < self.vocab_size])

def train_sentencepiece(texts, path, vocab_size):
    """Writes a tokenizer.model made as LLaMA's was: BPE, single digits, bytes for unknown characters, text unchanged.
    "(B" is two pieces, the newline is one. vocab_size is a maximum; ValueError if there are more single characters."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, vocab_size=vocab_size, model_type="bpe",
            byte_fallback=True, split_digits=True, split_by_unicode_script=True, normalization_rule_name="identity",
            remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, character_coverage=1.0,
            user_defined_symbols=["\n"], unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
            hard_vocab_limit=False, max_sentence_length=1 << 20, num_threads=1, minloglevel=2)
    except RuntimeError as error:
        raise ValueError(f"{path}: no tokenizer of {vocab_size} pieces from these texts: {error}") from None
    Path(path).write_bytes(model.getvalue())
