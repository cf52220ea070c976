"""Documents end to end, cut into sequences."""

import numpy as np

from ds_local.data import packing
from ds_local.data.packing import Packer


def ids(*numbers):
    return np.asarray(numbers, dtype=np.uint16)


def rows(packer):
    return [row["input_ids"] for row in packer.finish()]


def test_documents_end_to_end_with_an_end_behind_each(tmp_path):
    packer = Packer(tmp_path / "a.arrow", np.uint16, 3)
    assert packer.add(ids(5, 6), 9, end=1) == 3
    assert packer.add(ids(7), 2, end=None) == 1  # goes on
    assert packer.add(ids(), 0, end=1) == 1
    assert packer.add(ids(8, 1), 3, end=1) == 2  # has its end already
    assert packer.add(ids(9, 9), 3, end=1) == 3
    assert (packer.tokens, packer.of_text, packer.num_bytes, packer.available) == (10, 7, 17, 3)
    assert rows(packer) == [[5, 6, 1], [7, 1, 8], [1, 9, 9]]  # the last does not fill one


def test_sequences_do_not_depend_on_when_they_are_written(tmp_path, monkeypatch):
    found = []
    for held_back in (1, 256):
        monkeypatch.setattr(packing, "HELD_BACK", held_back)
        packer = Packer(tmp_path / f"{held_back}.arrow", np.uint16, 4)
        for start in range(2, 200):
            packer.add(np.arange(start, start + start % 9, dtype=np.uint16), 1, end=1)
            if held_back == 1:
                assert packer._num_held < 4 * 4
        found.append((rows(packer), packer.digest.hexdigest()))
    assert found[0] == found[1]


def test_the_end_may_become_the_other_split(tmp_path):
    train, other = (Packer(tmp_path / name, np.uint16, 2) for name in "ab")
    train.add(np.arange(21, dtype=np.uint16), 42, end=None)
    train.give_last_to(other, 0.2)
    assert rows(other) == [[16, 17], [18, 19]]
    assert rows(train) == [[i, i + 1] for i in range(0, 16, 2)]
    assert (train.num_bytes, other.num_bytes) == (34, 8)


def test_no_sequence_at_all(tmp_path):
    assert rows(Packer(tmp_path / "a.arrow", np.uint16, 2)) == []
