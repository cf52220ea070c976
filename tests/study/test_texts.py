"""The data of the quality study."""

import hashlib
import json
from importlib import metadata

from ds_local.study import texts


def test_the_text_of_packages_has_every_file_once(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "TEXT_OF", ("packaging", "pluggy"))
    text = texts.package_text(tmp_path)
    documents = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    facts = json.loads((tmp_path / "packages.json").read_text())
    assert len(documents) == len(set(documents)) == facts["files"] == len(facts["file_sha256"])
    assert facts["packages"] == {name: metadata.version(name) for name in texts.TEXT_OF}
    sums = [hashlib.sha256(document.encode()).hexdigest() for document in documents]
    assert sums == list(facts["file_sha256"].values())
    assert {name.partition("/")[0] for name in facts["file_sha256"]} == set(texts.TEXT_OF)
    first = text.read_bytes()
    assert texts.package_text(tmp_path).read_bytes() == first
