"""Bad inputs: data folders, models, config files, sources of text, tokenizers, run folders, and
runs continued with others.

Right: refused in one sentence that names the file or the difference, within 10 s; what was there
before is there afterwards, and no process stays.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from judging import Outcome, refused, tree_of
from workbench import MIX, MODEL, Bench, finished_run

Start = tuple[str, list[str], int]  # script, arguments, ranks
Maker = Callable[[Bench, Path], Start]


# --- training with something wrong ----------------------------------------------------------------


def _train(
    bench: Bench, folder: Path, settings: dict[str, Any] | None = None, **options: Any
) -> Start:
    return "train.py", bench.arguments(folder, settings, max_steps=2, save_every=0, **options), 2


def _data(change: Callable[[Path], Any]) -> Maker:
    """Training on a changed copy of the data folder."""

    def make(bench: Bench, folder: Path) -> Start:
        data = folder / "data"
        shutil.copytree(bench.data, data)
        change(data)
        return _train(bench, folder, data=data)

    return make


def _model_file(content: str | bytes) -> Maker:
    def make(bench: Bench, folder: Path) -> Start:
        path = folder / "bad.json"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return _train(bench, folder, model=path)

    return make


def _model_folder(change: Callable[[Path], Any]) -> Maker:
    """Training from a folder with a config, and what `change` puts there."""

    def make(bench: Bench, folder: Path) -> Start:
        model = folder / "bad-model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps({**MODEL, "vocab_size": bench.vocab_size}))
        change(model)
        return _train(bench, folder, model=model)

    return make


def _weights(content: bytes, name: str = "model.safetensors") -> Maker:
    return _model_folder(_write(name, _always(content)))


def _config_file(content: str | bytes) -> Maker:
    def make(bench: Bench, folder: Path) -> Start:
        path = folder / "bad.json"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return _train(bench, folder, deepspeed_config=path)

    return make


def _elsewhere(**options: Any) -> Maker:
    return lambda bench, folder: _train(bench, folder, **options)


def _file_as_run(bench: Bench, folder: Path) -> Start:
    return _train(bench, folder, output=folder / "model.json")


def _resumed(
    settings: dict[str, Any] | None = None, shape: dict[str, Any] | None = None,
    data: Callable[[Bench, Path], Path] | None = None, **options: Any,
) -> Maker:  # fmt: skip
    """A finished run, continued with something else."""

    def make(bench: Bench, folder: Path) -> Start:
        shutil.copytree(finished_run(bench), folder / "run")
        others = {"data": data(bench, folder)} if data else {}
        more = {"max_steps": 8, "resume": True, **others, **options}
        command = bench.arguments(folder, {**MIX, **(settings or {})}, shape, **more)
        return "train.py", command, 2

    return make


def _prepared(
    tokenizer: str, seq_len: int = 16, letters: str = "abcde"
) -> Callable[[Bench, Path], Path]:
    """Other data: of other text, or another tokenizer."""

    def make(bench: Bench, folder: Path) -> Path:
        rng = random.Random(letters)
        text = folder / "other.txt"
        text.write_text(
            "\n".join(
                " ".join("".join(rng.choices(letters, k=4)) for _ in range(30)) for _ in range(300)
            )
        )
        given = tokenizer or str(bench.data / "tokenizer")
        command = [
            "--source",
            str(text),
            "--tokenizer",
            given,
            "--seq-len",
            str(seq_len),
            "--output",
            str(folder / "other"),
        ]
        run = bench.server.finish("prepare_data.py", command)
        if run.statuses() != [0]:
            raise RuntimeError(f"cannot prepare other data: {run.outputs()}")
        return folder / "other"

    return make


# --- the other scripts ----------------------------------------------------------------------------


def _prepare(
    *arguments: str, files: dict[str, str | bytes] | None = None, text: bool = True
) -> Maker:
    """prepare_data.py on text of its own; "{folder}" in an argument or a file's name is the case's
    folder."""

    def make(bench: Bench, folder: Path) -> Start:
        source = ["--source", str(bench.work / "text.txt")] if text else []
        given = {
            "--tokenizer": str(bench.data / "tokenizer"),
            "--seq-len": "16",
            "--output": str(folder / "out"),
        }
        for name, content in (files or {}).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        own = [argument.format(folder=folder) for argument in arguments]
        rest = [part for name, value in given.items() if name not in own for part in (name, value)]
        return "prepare_data.py", [*source, *rest, *own], 1

    return make


def _source(name: str, content: str | bytes, *arguments: str) -> Maker:
    """prepare_data.py on one file."""
    return _prepare("--source", f"{{folder}}/{name}", *arguments, files={name: content}, text=False)


def _script(name: str, *arguments: str, change: Callable[[Path], Any] = lambda run: None) -> Maker:
    """A script on a changed copy of a finished run, "{run}"."""

    def make(bench: Bench, folder: Path) -> Start:
        shutil.copytree(finished_run(bench), folder / "run")
        change(folder / "run")
        places = {"folder": folder, "run": folder / "run", "data": bench.data}
        return name, [argument.format(**places) for argument in arguments], 1

    return make


def _export(*arguments: str, change: Callable[[Path], Any] = lambda run: None) -> Maker:
    return _script("export_hf.py", "{run}", "--output", "{folder}/out", *arguments, change=change)


# --- changes to files -----------------------------------------------------------------------------


def _remove(pattern: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        for path in list(folder.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def _write(pattern: str, content: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        found = list(folder.glob(pattern)) or [folder / pattern]
        for path in found:
            path.write_bytes(content(path.read_bytes() if path.exists() else b""))

    return change


def _half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _bit(content: bytes) -> bytes:
    """A token of the middle of an Arrow file."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def _other_words(content: bytes) -> bytes:
    return content.replace(b'"ab"', b'"zq"')


def _always(content: str | bytes) -> Callable[[bytes], bytes]:
    whole = content if isinstance(content, bytes) else content.encode()
    return lambda _: whole


def _edit(pattern: str, **values: Any) -> Callable[[Path], Any]:
    return _write(pattern, lambda content: json.dumps({**json.loads(content), **values}).encode())


def _file_instead(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("a file")


def _safetensors(**tensors: tuple[int, ...]) -> bytes:
    """A file of zeros in these shapes."""
    header, position = {}, 0
    for name, shape in tensors.items():
        size = 4
        for number in shape:
            size *= number
        header[name.replace("__", ".")] = {
            "dtype": "F32",
            "shape": list(shape),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(position)


ARROW = "train/*.arrow"
# what is wrong -> (how it is made, names of which the sentence must have one)
INPUTS: dict[str, tuple[Maker, tuple[str, ...]]] = {
    # data folders
    "data: nowhere": (_elsewhere(data="/nowhere/data"), ("/nowhere/data",)),
    "data: an empty folder": (_data(_remove("*")), ("data",)),
    "data: a file": (_data(_file_instead), ("data",)),
    "data: no prepared.json": (_data(_remove("prepared.json")), ("prepared.json",)),
    "data: prepared.json of another format": (_data(_edit("prepared.json", format=99)), ("format",)),
    "data: prepared.json with other lengths": (_data(_edit("prepared.json", seq_len=8)), ("seq_len", "sequences of", "data")),
    "data: no train split": (_data(_remove("train")), ("train",)),
    "data: no validation split": (_data(_remove("validation")), ("validation",)),
    "data: no dataset_dict.json": (_data(_remove("dataset_dict.json")), ("dataset_dict.json", "data")),
    "data: state.json cut off": (_data(_write("train/state.json", _half)), ("state.json", "data")),
    "data: Arrow file gone": (_data(_remove(ARROW)), ("train", "arrow")),
    "data: Arrow file empty": (_data(_write(ARROW, _always(""))), ("train", "arrow", "data")),
    "data: Arrow file cut off": (_data(_write(ARROW, _half)), ("train", "arrow", "data")),
    "data: a token changed": (_data(_write(ARROW, _bit)), ("fingerprint", "train", "data")),
    "data: a validation token changed": (_data(_write("validation/*.arrow", _bit)), ("fingerprint", "validation", "data")),
    "data: no tokenizer": (_data(_remove("tokenizer")), ("tokenizer",)),
    "data: tokenizer cut off": (_data(_write("tokenizer/tokenizer.json", _half)), ("tokenizer",)),
    "data: tokenizer of other words": (_data(_write("tokenizer/tokenizer.json", _other_words)), ("tokenizer",)),
    # models
    "model: nowhere": (_elsewhere(model="/nowhere/model.json"), ("/nowhere/model.json",)),
    "model: empty file": (_model_file(""), ("bad.json",)),
    "model: cut off": (_model_file('{"model_type": "gpt2", "n_la'), ("bad.json",)),
    "model: a list": (_model_file("[1, 2]"), ("bad.json",)),
    "model: a string": (_model_file('"gpt2"'), ("bad.json",)),
    "model: no UTF-8": (_model_file(b"\xff\xfe\x00\x01"), ("bad.json",)),
    "model: empty object": (_model_file("{}"), ("model_type", "bad.json")),
    "model: a key twice": (_model_file('{"model_type": "gpt2", "n_layer": 4, "n_layer": 2}'), ("n_layer",)),
    "model: of a family we cannot cut": (_model_file('{"model_type": "t5"}'), ("t5",)),
    "model: an encoder": (_model_file('{"model_type": "bert"}'), ("bert",)),
    "model: hub name, offline": (_elsewhere(model="gpt2-nowhere"), ("gpt2-nowhere",)),
    "model: folder without config": (_model_folder(_remove("*")), ("bad-model", "config.json")),
    "model: weights empty": (_weights(b""), ("model.safetensors",)),
    "model: weights are noise": (_weights(b"\xff" * 64), ("model.safetensors",)),
    "model: weights of another model": (_weights(_safetensors(x__weight=(2, 2))), ("bad-model", "wte", "weight")),
    "model: weights of another width": (_weights(_safetensors(transformer__wte__weight=(8, 8))), ("wte", "bad-model")),
    "model: pickled weights only": (_weights(b"\x80\x04.", "pytorch_model.bin"), ("pytorch_model.bin", "bad-model")),
    # ds_config.json
    "config: nowhere": (_elsewhere(deepspeed_config="/nowhere/ds.json"), ("/nowhere/ds.json",)),
    "config: empty file": (_config_file(""), ("bad.json",)),
    "config: cut off": (_config_file('{"train_batch_size": 8,'), ("bad.json",)),
    "config: a list": (_config_file("[]"), ("bad.json",)),
    "config: no UTF-8": (_config_file(b"\xff\xfe\x00\x01"), ("bad.json",)),
    "config: a comment": (_config_file('{"train_batch_size": 8} // mine'), ("bad.json",)),
    "config: a key twice": (_config_file('{"train_batch_size": 8, "train_batch_size": 4}'), ("train_batch_size",)),
    "config: a folder": (_elsewhere(deepspeed_config="/tmp"), ("/tmp",)),
    # run folders
    "run: a file in its place": (_file_as_run, ("model.json",)),
    "run: it holds a run": (_resumed(resume=False), ("run",)),
    # runs continued with something else
    "resume: another width": (_resumed(shape={"n_embd": 64}), ("n_embd", "model")),
    "resume: other depth": (_resumed(shape={"n_layer": 6}), ("n_layer", "model")),
    "resume: another seed": (_resumed(seed=7), ("seed",)),
    "resume: another scheme": (_resumed(mode="local"), ("mode", "scheme", "mix")),
    "resume: another batch": (_resumed({"gradient_accumulation_steps": 8}), ("batch", "gradient_accumulation_steps")),
    "resume: other text": (_resumed(data=_prepared("", letters="xyzuv")), ("data", "fingerprint")),
    "resume: another tokenizer": (_resumed(data=_prepared("sentencepiece:310")), ("tokenizer", "vocab")),
    "resume: other optimizer": (_resumed({"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}), ("optimizer",)),
    "resume: other stages": (_resumed(num_stages=1, segments_per_stage=1), ("stages", "segment", "replicas")),
    # sources of text
    "prepare: no source": (_prepare("--source", "/nowhere/text.txt", text=False), ("/nowhere/text.txt",)),
    "prepare: empty file": (_source("e.txt", ""), ("e.txt", "sources", "empty")),
    "prepare: spaces": (_source("e.txt", "  \n\n "), ("e.txt", "sources", "empty")),
    "prepare: noise": (_source("e.bin", b"\xff\x00\xfe" * 99), ("e.bin", "UTF-8")),
    "prepare: too little": (_source("e.txt", "ab"), ("e.txt", "too few", "seq-len")),
    "prepare: jsonl without text": (_source("e.jsonl", '{"a": 1}\n'), ("e.jsonl",)),
    "prepare: jsonl cut off": (_source("e.jsonl", '{"text": "a b c'), ("e.jsonl",)),
    "prepare: jsonl of numbers": (_source("e.jsonl", '{"text": 5}\n'), ("e.jsonl", "text")),
    "prepare: parquet of noise": (_source("e.parquet", b"PAR1noise"), ("e.parquet",)),
    "prepare: gz of noise": (_source("e.txt.gz", b"\x1f\x8bnoise"), ("e.txt.gz",)),
    "prepare: hub name, offline": (_prepare("--source", "hub:nobody/nothing", text=False), ("nobody/nothing",)),
    "prepare: length 0": (_prepare("--seq-len", "0"), ("seq-len",)),
    "prepare: length -1": (_prepare("--seq-len", "-1"), ("seq-len",)),
    "prepare: length in words": (_prepare("--seq-len", "long"), ("seq-len",)),
    "prepare: share nan": (_prepare("--validation-share", "nan"), ("validation-share",)),
    "prepare: share 2": (_prepare("--validation-share", "2"), ("validation-share",)),
    "prepare: share -1": (_prepare("--validation-share", "-1"), ("validation-share",)),
    "prepare: no tokenizer": (_prepare("--tokenizer", "/nowhere/tokenizer"), ("/nowhere/tokenizer",)),
    "prepare: tokenizer of 3 words": (_prepare("--tokenizer", "sentencepiece:3"), ("sentencepiece:3",)),
    "prepare: tokenizer of words": (_prepare("--tokenizer", "sentencepiece:many"), ("sentencepiece:many",)),
    "prepare: tokenizer too large": (_prepare("--tokenizer", "sentencepiece:900000"), ("900000",)),
    "prepare: output is a file": (_prepare("--output", "{folder}/e.txt", files={"e.txt": "mine"}), ("e.txt",)),
    "prepare: output is somebody's": (_prepare("--output", "{folder}/mine", files={"mine/letter.txt": "mine"}), ("mine",)),
    "prepare: output holds the source": (_source("mine/e.txt", "a b c d e f\n" * 999, "--output", "{folder}/mine"), ("mine",)),
    "prepare: output in a file": (_prepare("--output", "{folder}/e.txt/out", files={"e.txt": "mine"}), ("e.txt",)),
    # what is made of a run
    "export: no run": (_script("export_hf.py", "/nowhere/run", "--output", "{folder}/out"), ("/nowhere/run",)),
    "export: no such segment": (_export("--segment", "9"), ("segment 9",)),
    "export: output is somebody's": (_script("export_hf.py", "{run}", "--output", "{run}"), ("run",)),
    "export: no checkpoint": (_export(change=_remove("checkpoints/*")), ("checkpoints",)),
    "export: file damaged": (_export(change=_write("checkpoints/*/layer_01*", _bit)), ("layer_01",)),
    "evaluate: no run": (_script("evaluate.py", "/nowhere/run", "--data", "{data}"), ("/nowhere/run",)),
    "evaluate: no data": (_script("evaluate.py", "{run}", "--data", "/nowhere/data"), ("/nowhere/data",)),
    "generate: no run": (_script("generate.py", "/nowhere/run", "--prompt", "a"), ("/nowhere/run",)),
    "summarize: no run": (_script("summarize.py", "/nowhere/run"), ("/nowhere/run",)),
}  # fmt: skip


def cases(seed: int, count: int) -> list[dict[str, Any]]:
    names = list(INPUTS)
    random.Random(f"inputs {seed}").shuffle(names)
    return [{"input": name} for name in names[:count]]


def play(bench: Bench, case: dict[str, Any]) -> Outcome:
    make, names = INPUTS[case["input"]]
    folder = bench.folder()
    script, command, ranks = make(bench, folder)
    before = tree_of(folder)
    outcome = refused(bench.server.start(script, command, ranks=ranks), names)
    if outcome.wrong != ["accepted"]:
        after = tree_of(folder)
        lost = [name for name in before if after.get(name) != before[name] and "/logs/" not in name]
        outcome.expect(not lost, f"the refusal changed {', '.join(lost)[:300]}")
        left = [name for name in after if name not in before and "/logs/" not in name]
        outcome.expect(not left, f"the refusal left {', '.join(left)[:300]}")
    return outcome
