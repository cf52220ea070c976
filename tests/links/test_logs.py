"""What a rank writes."""

import logging

from ds_local.links.logs import start_log


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
