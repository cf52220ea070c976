import pytest

from ds_local.checkpoints.run_file import RUN_FILE, run_facts


def test_what_a_run_wrote_is_read(tmp_path):
    (tmp_path / RUN_FILE).write_text('{"arguments": {"max_steps": 3}}')
    assert run_facts(tmp_path) == {"arguments": {"max_steps": 3}}


OTHERS = [  # parts that no run has written
    '{"arguments": null}',
    '{"config": [], "arguments": {}}',
    '{"layout": {"stages": "2"}}',
    '{"starts": ["now"]}',
    '{"starts": null}',
    '{"routes": 3}',
]


@pytest.mark.parametrize("text", [None, "", "{", "[1]", "[" * 100_000, "\xff", *OTHERS])
def test_what_cannot_be_read_says_nothing(tmp_path, text):
    if text is not None:
        (tmp_path / RUN_FILE).write_bytes(text.encode("latin-1"))
    assert run_facts(tmp_path) == {}
