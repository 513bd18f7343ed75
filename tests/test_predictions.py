"""Answers on disk survive whatever happens, and are never mixed. Run: pytest tests/test_predictions.py"""
import json

import pytest

from evaluation.predictions import Condition, key_of

def rows(*indices, task="AC", **more):
    return [{"task": task, "index": i, "prediction": f"({i}) é", "candidates": ["a", "b"], "answer": "a", **more}
            for i in indices]

def opened(out, rank=0, settings=None, restart=False, name=""):
    condition = Condition(out, name, settings or {"frames": 16}, rank)
    if rank == 0:
        condition.prepare(restart, {"commands": ["python mvbench.py"]})
    return condition

def test_what_is_written_is_on_disk_at_once_and_read_again(tmp_path):
    one = opened(tmp_path / "new" / "folder")
    one.write(rows(0, 1))
    one.write(rows(2))
    again = opened(tmp_path / "new" / "folder")                            # the first was never closed, as after a kill
    assert [again.read()[key]["prediction"] for key in (("AC", 0, 0), ("AC", 1, 0), ("AC", 2, 0))] == [
        "(0) é", "(1) é", "(2) é"]

def test_one_file_in_order_once_all_is_there(tmp_path):
    ranks = [opened(tmp_path, rank) for rank in (0, 1)]
    ranks[0].write(rows(2, 0))
    ranks[1].write(rows(1, 7))                                             # 7 is of an earlier, larger run
    found = ranks[0].merge([("AC", i, 0) for i in range(3)])
    assert [row["index"] for row in found] == [0, 1, 2]
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == [0, 1, 2, 7] and not list(tmp_path.glob("*rank*"))
    before = (tmp_path / "predictions.jsonl").stat().st_mtime_ns
    assert len(opened(tmp_path).merge([("AC", 0, 0)])) == 1                # nothing new: the file is left as it is
    assert (tmp_path / "predictions.jsonl").stat().st_mtime_ns == before

@pytest.mark.parametrize("torn", ['{"task": "AC", "ind', "\x00\x00", '{"task": "AC", "index": 9}'])
def test_a_half_written_line_is_dropped_and_the_next_begins_anew(tmp_path, torn):
    opened(tmp_path).write(rows(0, 1))
    part = tmp_path / "predictions.rank0.jsonl"
    with open(part, "a") as f:
        f.write(torn)
    again = opened(tmp_path)
    again.write(rows(2))
    assert sorted(key[1] for key in opened(tmp_path).read()) == [0, 1, 2]

def test_other_settings_are_named_and_nothing_is_touched(tmp_path):
    opened(tmp_path).write(rows(0))
    with pytest.raises(ValueError, match=r'frames: 16 there, 8 now; decode: null there, "letter" now\): choose'):
        opened(tmp_path, settings={"frames": 8, "decode": "letter"})
    assert len(opened(tmp_path).read()) == 1
    assert not opened(tmp_path, settings={"frames": 8}, restart=True).read()

def test_controls_lie_side_by_side(tmp_path):
    opened(tmp_path).write(rows(0))
    blank = opened(tmp_path, name="blank")
    assert not blank.read()
    blank.write(rows(0, 1))
    blank.merge([])
    assert len(opened(tmp_path).read()) == 1 and len(opened(tmp_path, name="blank").read()) == 2

def test_a_line_that_is_no_prediction_is_named_and_an_answer_is_worth_more_than_none(tmp_path):
    opened(tmp_path).write([*rows(0), *rows(1, unread="a.mp4: no such file")])
    opened(tmp_path, rank=1).write(rows(0, unread="a.mp4: no such file"))
    assert ["unread" in row for row in opened(tmp_path).read().values()] == [False, True]
    with open(tmp_path / "predictions.rank0.jsonl", "a") as f:
        f.write("garbage\n")
    with pytest.raises(ValueError, match="predictions.rank0.jsonl, line 3 is no prediction: delete the line"):
        opened(tmp_path).read()

def test_orders_of_the_options_are_different_answers():
    assert key_of(rows(0)[0]) == ("AC", 0, 0) and key_of(rows(0, shift=2)[0]) == ("AC", 0, 2)
