"""Reports in order, each once. Here writer and reader are one rank; tests/dist has two."""

import torch

from ds_local.links.mailbox import Mailbox


def test_what_is_written_is_read_once_and_in_order():
    mailbox = Mailbox(None, shape=(2, 3))
    assert mailbox.read() == []
    reports = [torch.full((2, 3), float(number), dtype=torch.float64) for number in range(40)]
    for report in reports:  # more than a ring of them
        mailbox.write(report)
    found = mailbox.read(at_least=1)
    assert len(found) == 40
    assert all(map(torch.equal, found, reports))
    assert (mailbox.sent, mailbox.taken) == (40, 40)
    assert mailbox.read() == []
