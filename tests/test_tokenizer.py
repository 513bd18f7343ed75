"""pytest tests/test_tokenizer.py"""
import json

import pytest
from conftest import BERT_VOCAB

from tokenizer import SentencePiece, WordPiece, basic_tokenize, train_sentencepiece, train_wordpiece

TOY = ["Question: Which shape moves?\nOptions:\n(A) the red circle\n(B) the blue star\nOnly give the best option.",
       "The red circle moves 12 steps ###Assistant: Best option:(B) the blue star ###"] * 20

@pytest.fixture(scope="module")
def wordpiece(golden):
    return WordPiece.load(BERT_VOCAB)

@pytest.fixture(scope="module")
def sentencepiece(golden):
    return SentencePiece(golden / "tokenizer.model")

# ---- parity with the official tokenizers -----------------------------------------------------------------------------

@pytest.mark.parametrize("recorded, options", [
    ("stage1", {}),
    ("stage1_right32", {"max_length": 32}),
    ("ids", {"sep": True}),
    ("right32", {"sep": True, "max_length": 32}),
    ("left32", {"sep": True, "max_length": 32, "truncate": "left"}),
    ("left8", {"sep": True, "max_length": 8, "truncate": "left"}),
])
def test_wordpiece_gives_the_official_ids(golden, wordpiece, recorded, options):
    for case in json.loads((golden / "wordpiece.json").read_text())["cases"]:
        assert wordpiece.encode(case["text"], **options) == case[recorded], case["text"]

def test_sentencepiece_gives_the_official_ids(golden, sentencepiece):
    for case in json.loads((golden / "sentencepiece.json").read_text())["cases"]:
        assert sentencepiece.encode(case["text"]) == case["ids"], case["text"]
        assert sentencepiece.encode(case["text"], bos=True) == case["with_bos"], case["text"]
        if case["ids"] == case["raw_spm"]:  # no literal <s> in it
            assert sentencepiece.decode(case["ids"]) == case["decode_raw_spm"], case["text"]

def test_dec_stands_behind_the_vocabulary(golden, wordpiece):
    assert (wordpiece.dec_id, wordpiece.vocab_size) == (30522, 30523)
    assert [wordpiece.pad_id, wordpiece.unk_id, wordpiece.cls_id, wordpiece.sep_id] == [0, 100, 101, 102]
    tiny = WordPiece.load(golden / "tiny_vocab.txt")
    assert tiny.dec_id == 200 and WordPiece(tiny.pieces).vocab_size == 201  # not added twice

# ---- by hand ---------------------------------------------------------------------------------------------------------

def test_basic_tokenization():
    assert basic_tokenize("Don't blink,\tZoë!") == ["don", "'", "t", "blink", ",", "zoe", "!"]
    assert basic_tokenize("a视频\ufffdb $5") == ["a", "视", "频", "b", "$", "5"]

def test_greedy_longest_piece():
    vocab = WordPiece(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "kite", "ki", "##te", "##t", "##s"])
    assert vocab.encode("kites") == [2, 5, 9]         # kite ##s, not ki ##te ##s
    assert vocab.encode("kitx") == [2, 1]             # what cannot be cut to its end is unknown as a whole
    assert vocab.encode("kite " * 9, max_length=4, sep=True) == [2, 5, 5, 3]
    assert vocab.encode("kite", max_length=1) == [2]  # [CLS] always stays

def test_ends_point_at_the_last_character_of_each_piece(sentencepiece):
    for text in ("a red kite", "é日😀\n  x ", "a <s> b</s>", "▁", "🪁🪁", "tab\ta", ""):
        ids, ends = sentencepiece.encode_with_ends(text)
        assert len(ids) == len(ends) and ends == sorted(ends)
        assert (ends[-1] if ends else -1) == len(text) - 1
    assert sentencepiece.encode_with_ends("Best option:(A")[1] == [3, 10, 11, 12, 13]
    assert sentencepiece.encode_with_ends("🪁")[1] == [0] * 5  # the opening space and the kite's four bytes

# ---- training --------------------------------------------------------------------------------------------------------

def test_a_trained_sentencepiece(tmp_path):
    for name in ("one", "two"):
        train_sentencepiece(TOY, tmp_path / name, vocab_size=2000)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    tok = SentencePiece(tmp_path / "one")
    assert (tok.unk_id, tok.bos_id, tok.eos_id) == (0, 1, 2) and tok.vocab_size < 2000
    for text in [*TOY[:2], "  Zoë's 🪁\n\n"]:  # unknown letters become bytes and come back
        assert tok.decode(tok.encode(text)) == text
    pieces = [tok.model.id_to_piece(i) for i in tok.encode("Best option:(B) the 12")]
    assert pieces[-6:] == ["B", ")", "▁the", "▁", "1", "2"]  # the letter alone, digits one by one

def test_a_trained_wordpiece(tmp_path):
    train_wordpiece(TOY, tmp_path / "vocab.txt")
    vocab = WordPiece.load(tmp_path / "vocab.txt")
    assert vocab.unk_id not in vocab.encode(TOY[0]) + vocab.encode("strap")  # an unseen word of seen letters
    assert len(vocab.encode("The red circle")) == 4
    assert vocab.pieces[-1] == "[DEC]"

# ---- faults ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("load", [WordPiece.load, SentencePiece])
def test_a_missing_or_damaged_file_is_named(tmp_path, load):
    path = tmp_path / "some_vocabulary"
    with pytest.raises(FileNotFoundError, match="some_vocabulary: no such"):
        load(path)
    path.write_bytes(b"\xff\xfe\x00 damaged")
    with pytest.raises(ValueError, match="some_vocabulary: not a"):
        load(path)

def test_a_vocabulary_without_specials_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\na\n")
    with pytest.raises(ValueError, match=r"vocab.txt.*lacks \[SEP\] \[MASK\]"):
        WordPiece.load(tmp_path / "vocab.txt")

def test_too_small_a_vocabulary_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="tokenizer.model: no tokenizer of 100 pieces"):
        train_sentencepiece(TOY, tmp_path / "tokenizer.model", vocab_size=100)
    assert not (tmp_path / "tokenizer.model").exists()

def test_rows_beyond_the_pieces_are_no_text(golden):
    """Some LLMs have more rows than their tokenizer has pieces, for padding; one that is drawn is not the end."""
    tok = SentencePiece(golden / "tokenizer.model")
    assert tok.decode([*tok.encode("a kite"), tok.vocab_size, tok.vocab_size + 7]) == "a kite"
