"""What a rank writes."""

import logging
import sys

from ds_local.links.logs import _LogFile, say, start_log


def test_every_rank_has_a_log_of_its_own(tmp_path):
    before = {name: list(logging.getLogger(name).handlers) for name in ("ds_local", "DeepSpeed")}
    try:
        path = start_log(tmp_path / "logs", 1, 3)
        logging.getLogger("ds_local").info("hello")
        logging.getLogger("DeepSpeed").warning("there")
        lines = path.read_text().splitlines()
    finally:
        for logger, handlers in before.items():
            for handler in set(logging.getLogger(logger).handlers) - set(handlers):
                logging.getLogger(logger).removeHandler(handler)
                handler.close()
    assert path.name == "rank-003.log"
    assert [line.partition(" stage 1 rank 3 ")[2].split(" ", 2)[1:] for line in lines] == [
        ["INFO", "hello"],
        ["WARNING", "there"],
    ]


def test_a_full_disk_leaves_no_traceback_on_the_console(tmp_path, capsys):
    handler = _LogFile(tmp_path / "log")
    record = logging.LogRecord("ds_local", logging.INFO, "", 0, "hello", None, None)
    for error in (OSError(28, "No space left on device"), ValueError("another fault")):
        try:
            raise error
        except (OSError, ValueError):
            handler.handleError(record)
        said = capsys.readouterr().err
        assert ("Logging error" in said) is isinstance(error, ValueError)
    handler.close()


def test_a_sentence_has_a_line_of_its_own(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    say("alone")
    monkeypatch.setenv("RANK", "0")
    say("in a log, where no rank has a bar")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    say("beside a bar of another rank")
    said = capsys.readouterr().err
    assert said == "alone\nin a log, where no rank has a bar\n\nbeside a bar of another rank\n"
