"""One way through all sources: which split a piece belongs to, and a bar that moves."""

import io

import pytest
from sentences import one_sentence
from test_corpus import words
from test_kinds import LINES, ROWS, write

from ds_local.data import way as module
from ds_local.data.documents import Reading
from ds_local.data.left_out import Skipped
from ds_local.data.sources import Source
from ds_local.data.way import Piece, Way


def pieces(train, validation=(), share=0.0, **how):
    sources = [[Source(str(path), str(path)) for path in paths] for paths in (train, validation)]
    with Way(*sources, (), Reading(**how), "") as way:
        found = list(way.pieces(share))
    return found, way


def test_pieces_know_their_source_and_their_size(tmp_path):
    one, two = write(tmp_path / "a.txt", "héllo"), write(tmp_path / "b.jsonl", LINES)
    found, way = pieces([one, two])
    assert found[0] == (Piece(str(one), False, 6, True, "a.txt:0", 0, 5), "héllo")
    assert {piece.source for piece, _ in found[1:]} == {str(two)}
    assert way.num_documents == 1 + len(ROWS)
    assert way.num_bytes == 6 + len(LINES)


def test_documents_are_held_out_by_their_names_alone(tmp_path):
    places = [tmp_path / "a.jsonl", tmp_path / "b" / "a.ndjson"]
    places[1].parent.mkdir()
    for place in places:
        write(place, LINES * 20)
    held_out = [[p.held_out for p, _ in pieces([place], share=0.25)[0]] for place in places]
    assert held_out[0] == held_out[1]
    assert 0.15 < sum(held_out[0]) / len(held_out[0]) < 0.35


def test_a_file_that_comes_twice_is_in_one_split(tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    for number in range(40):
        write(inner / f"{number}.txt", f"text {number}")
        (inner / f"link-{number}.txt").symlink_to(f"{number}.txt")
    found, _ = pieces([tmp_path, inner, inner / "0.txt"], share=0.3)
    split = {held_out: {t for p, t in found if p.held_out == held_out} for held_out in (0, 1)}
    assert len(found) == 161
    assert split[0]
    assert split[1]
    assert not split[0] & split[1]


def test_with_validation_text_nothing_is_held_out(tmp_path):
    one, two = write(tmp_path / "a.jsonl", LINES), write(tmp_path / "b.jsonl", LINES)
    found, _ = pieces([one], [two], share=0.5)
    assert [piece.held_out for piece, _ in found] == [False] * 30 + [True] * 30


def test_too_large_a_share_of_malformed_rows_is_refused_at_the_end(tmp_path):
    place = write(tmp_path / "a.jsonl", "[]\n" + LINES)
    assert len(pieces([place], skipped=Skipped(max_malformed=0.04))[0]) == 30
    with one_sentence("1 rows are malformed, 3.23% of 31, more than --max-malformed 0.03"):
        pieces([place], skipped=Skipped(max_malformed=0.03))


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_the_bar_counts_bytes_of_files_on_a_terminal_alone(tmp_path, monkeypatch, terminal):
    write(tmp_path / "a.jsonl", LINES * 200)
    write(tmp_path / "b.txt", words(9))
    output = Terminal() if terminal else io.StringIO()
    seen, whole = [], module.tqdm

    def bar(*args, **how):
        made = whole(*args, **how, file=output)
        update = made.update
        made.update = lambda count: seen.append((made.n, made.total)) or update(count)
        return made

    monkeypatch.setattr(module, "tqdm", bar)
    source = Source("x", str(tmp_path))
    with Way([source], [], (), Reading(), "tokenizing") as way:
        list(way.pieces(0.0))
        bytes_shown = way._bar.n
    assert ("tokenizing: 100%" in output.getvalue()) is terminal
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert seen[-1][1] == size
    if terminal:
        assert bytes_shown == size
        assert len({shown for shown, _ in seen}) > 10  # it moves
