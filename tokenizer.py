"""Text to ids: WordPiece, written out by hand, for the Q-Former; SentencePiece for the LLM.

    "a red kite"  --WordPiece-->      [CLS] a red kit ##e            what BERT read: lower case, words cut greedily
                  --SentencePiece-->  ▁a ▁red ▁k ite                 what LLaMA read: a space opens a piece

WordPiece follows BERT uncased (Devlin et al. 2018; google-research/bert, tokenization.py) with the one token that
VideoChat2 adds, [DEC], the start of a caption that is to be written. SentencePiece is the library of that name under
the rules of Hugging Face's LlamaTokenizer (4.40.1, legacy): literal <s>, </s>, <unk> are split off first.
Not here: prompts, labels and padding (prompt.py). The LLM's tokenizer is read, or trained for the toy, never altered.

    pytest tests/test_tokenizer.py
"""
import io
import re
import unicodedata
from collections import Counter
from pathlib import Path

import sentencepiece

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]  # of every BERT vocabulary
DEC = "[DEC]"                                              # VideoChat2's own, after all others: id 30522 of 30523
MAX_WORD = 100                                             # characters; a longer word is one [UNK]
SPACE = "▁"                                                # how SentencePiece writes a space


# ---- WordPiece -------------------------------------------------------------------------------------------------------

class WordPiece:
    """Ids as the Q-Former wants them. `vocab` lists the pieces, the line number is the id; "##" continues a word."""

    def __init__(self, vocab):
        missing = [name for name in SPECIALS if name not in vocab]
        if missing:
            raise ValueError(f"vocabulary of {len(vocab)} entries lacks {' '.join(missing)}")
        self.pieces = list(vocab) + ([] if DEC in vocab else [DEC])
        self.id_of = {piece: i for i, piece in enumerate(self.pieces)}
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (self.id_of[name] for name in SPECIALS)
        self.dec_id = self.id_of[DEC]
        self.vocab_size = len(self.pieces)
        self.split_specials = re.compile("(" + "|".join(map(re.escape, [*SPECIALS, DEC])) + ")")

    @classmethod
    def load(cls, path):
        """Read a vocab.txt, one piece per line. Raises FileNotFoundError or ValueError with the file's name."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such WordPiece vocabulary (vocab.txt)")
        try:
            # subtle: not splitlines(), which would also cut at the odd Unicode line marks that BERT's list may contain
            return cls(path.read_text(encoding="utf-8").rstrip("\n").split("\n"))
        except ValueError as error:
            raise ValueError(f"{path}: not a WordPiece vocabulary: {error}") from None

    def encode(self, text, max_length=None, sep=False, truncate="right"):
        """`[CLS] w1 .. wn`, with `[SEP]` behind it if `sep`; at most `max_length` ids, cut at the side `truncate`.

        # QUIRK models/bert/tokenization_bert.py:264-265: stage 1 reads captions without [SEP]; stages 2 and 3 read the
        # instruction with it, and cut a long one on the left.
        """
        ids = [i for chunk in self.split_specials.split(text) for i in self._chunk(chunk)]
        ends = [self.sep_id] if sep else []
        room = len(ids) if max_length is None else max(max_length - 1 - len(ends), 0)  # [CLS] and [SEP] always stay
        kept = ids[:room] if truncate == "right" else ids[max(len(ids) - room, 0):]
        return [self.cls_id, *kept, *ends]

    def _chunk(self, chunk):
        if chunk == DEC or chunk in SPECIALS:
            return [self.id_of[chunk]]
        return [i for word in words(chunk) for i in self._word(word)]

    def _word(self, word):
        """Greedy: the longest piece that fits, then the longest that continues it. One misfit makes the word [UNK]."""
        if len(word) > MAX_WORD:
            return [self.unk_id]
        ids, start = [], 0
        while start < len(word):
            mark = "##" if start else ""
            check_state_dict = (end for end in range(len(word), start, -1) if mark + word[start:end] in self.id_of)
            end = next(check_state_dict, None)
            if end is None:
                return [self.unk_id]
            ids.append(self.id_of[mark + word[start:end]])
            start = end
        return ids


def words(text):
    """BERT's basic tokenisation: "Don't blink, Zoë" -> don ' t blink , zoe"""
    spaced = "".join(f" {c} " if is_cjk(c) else " " if c.isspace() else c for c in text if not is_dropped(c))
    found = []
    for word in unicodedata.normalize("NFC", spaced).split():
        bare = "".join(c for c in unicodedata.normalize("NFD", word.lower()) if unicodedata.category(c) != "Mn")
        found += "".join(f" {c} " if is_punctuation(c) else c for c in bare).split()
    return found


def is_dropped(c):
    return c not in "\t\n\r" and (c == "\ufffd" or unicodedata.category(c).startswith("C"))


def is_punctuation(c):
    """Unicode's punctuation, and the ASCII signs that Unicode counts among symbols, as $ and ^."""
    return unicodedata.category(c).startswith("P") or (c.isascii() and c.isprintable() and not c.isalnum() and c != " ")


def is_cjk(c):
    """Chinese characters stand alone as words: the unified ideographs with their extensions A-E and compatibility."""
    ranges = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F),
              (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))
    return any(low <= ord(c) <= high for low, high in ranges)


def train_wordpiece(texts, path):
    """Write a vocab.txt: specials, all words of `texts` (most frequent first), single characters, alone and as ##."""
    count = Counter(word for text in texts for word in words(text))
    letters = sorted({c for word in count for c in word})
    by_count = sorted(count, key=lambda word: (-count[word], word))
    vocab = dict.fromkeys([*SPECIALS, *by_count, *letters, *("##" + c for c in letters)])
    Path(path).write_text("\n".join(vocab) + "\n", encoding="utf-8")


# ---- SentencePiece ---------------------------------------------------------------------------------------------------

SPECIAL = re.compile("(<s>|</s>|<unk>)")


class SentencePiece:
    """A LLaMA-like tokenizer.model. Ids go in and out as plain lists; <s> and </s> are added only when asked for."""

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
        ids = []
        for chunk in SPECIAL.split(text):
            ids += [self.special[chunk]] if chunk in self.special else self.model.encode(chunk) if chunk else []
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_with_ends(self, text):
        """Ids of `text` and, for each, the index of its last character in `text`: which words it belongs to."""
        ids, ends, at = [], [], 0
        for chunk in SPECIAL.split(text):
            if chunk in self.special:
                ids.append(self.special[chunk])
                ends.append(at + len(chunk) - 1)
            elif chunk:
                self._chunk(chunk, at, ids, ends)
            at += len(chunk)
        return ids, ends

    def _chunk(self, chunk, at, ids, ends):
        # subtle: SentencePiece opens every chunk, also behind <s>, with a space of its own: the first character gets it
        character = [at] + [at + i for i, c in enumerate(chunk) for _ in c.replace(SPACE, " ").encode()]  # of each byte
        size = 0
        for piece in self.model.encode(chunk, out_type=str):
            ids.append(self.model.piece_to_id(piece))
            size += 1 if self.model.is_byte(ids[-1]) else len(piece.replace(SPACE, " ").encode())
            ends.append(character[size - 1])

    def decode(self, ids):
        """Text of `ids`; <s>, </s>, and rows that an LLM has beyond its tokenizer's pieces, leave no trace."""
        return self.model.decode([i for i in ids if i < self.vocab_size])


def train_sentencepiece(texts, path, vocab_size):
    """Write a tokenizer.model as LLaMA's was made: BPE, single digits, bytes for what is unknown, text unchanged.

    `vocab_size` is the most there can be; few texts give fewer. Raises ValueError if it cannot hold even the letters.
    Pieces never mix brackets and letters, so that the letter of "(B" is a token of its own. The newline is one too.
    """
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
