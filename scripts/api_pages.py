"""The reference of the public names as Markdown, read from the source without importing it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "ds_local"
# class -> its methods that a training script calls, in the order of their use
METHODS = {
    "LocalPipelineEngine": (
        "train_batch",
        "has_loss",
        "segment_losses",
        "eval_batch",
        "save_checkpoint",
        "load_checkpoint",
        "ends_after",
        "request_stop",
        "should_stop",
        "last_event",
        "meeting",
        "destroy",
    ),
    "Callback": ("on_step", "on_report", "on_validation", "on_save", "on_end"),
    "Run": ("step", "save", "end"),
    "Costs": ("from_profile",),
}
Function = ast.FunctionDef


def api() -> str:
    """Every name in `ds_local.__all__`, then the errors."""
    homes = _homes()
    parts = []
    for name, home in homes.items():
        if home == "errors":
            continue
        node = _definition(PACKAGE / f"{home.replace('.', '/')}.py", name)
        parts += [f"## {name}", "", *_described(node), ""]
    parts += [
        "## Errors",
        "",
        "In `ds_local.errors`; a message is one sentence with what is wrong, the values and the "
        "remedy.",
        "",
        "| error | is also | when |",
        "|---|---|---|",
        *_errors(),
    ]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)) + "\n"


def _homes() -> dict[str, str]:
    """Public name -> module below the package, from its __init__."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    values = {
        ast.unparse(node.targets[0]): node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
    }
    homes: dict[str, str] = ast.literal_eval(values["_HOME"])
    return {name: homes[name] for name in ast.literal_eval(values["__all__"])}


def _definition(path: Path, name: str) -> Function | ast.ClassDef:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, Function | ast.ClassDef) and node.name == name:
            return node
    raise LookupError(f"{path} defines no {name}")


def _described(node: Function | ast.ClassDef) -> Iterator[str]:
    if isinstance(node, Function):
        yield from _function(node)
        return
    methods = [one for one in node.body if isinstance(one, Function)]
    begins = next((one for one in methods if one.name == "__init__"), None)
    if begins is not None and not begins.args.vararg:
        yield from _signature(begins, node.name)
    yield from _text(ast.get_docstring(node) or "")
    fields = [one for one in node.body if isinstance(one, ast.AnnAssign) and one.value is not None]
    if _is_dataclass(node):
        yield from (f"- `{ast.unparse(one)}`" for one in fields)
        yield ""
    for name in METHODS.get(node.name, ()):
        method = next(one for one in methods if one.name == name)
        yield from (f"### {node.name}.{name}", "", *_function(method))


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def _function(node: Function) -> Iterator[str]:
    if not any(ast.unparse(one).endswith("property") for one in node.decorator_list):
        yield from _signature(node, node.name)
    else:
        yield from (f"A property, `{ast.unparse(node.returns) if node.returns else ''}`.", "")
    yield from _text(ast.get_docstring(node) or "")


def _signature(node: Function, name: str) -> Iterator[str]:
    parameters = [p for p in _parameters(node.args) if p not in ("self", "cls")]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns and name == node.name else ""
    line = f"{name}({', '.join(parameters)}){returns}"
    yield "```python"
    if len(line) <= 100:
        yield line
    else:
        yield from (f"{name}(", *(f"    {one}," for one in parameters), f"){returns}")
    yield from ("```", "")


def _parameters(arguments: ast.arguments) -> Iterator[str]:
    positional = [*arguments.posonlyargs, *arguments.args]
    missing = [None] * (len(positional) - len(arguments.defaults))
    for one, default in zip(positional, [*missing, *arguments.defaults], strict=True):
        yield _parameter(one, default)
    if arguments.vararg:
        yield f"*{arguments.vararg.arg}"
    for one, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield _parameter(one, default)
    if arguments.kwarg:
        yield f"**{arguments.kwarg.arg}"


def _parameter(one: ast.arg, default: ast.expr | None) -> str:
    kind = f": {ast.unparse(one.annotation)}" if one.annotation else ""
    if default is None:
        return one.arg + kind
    return f"{one.arg}{kind}{' = ' if kind else '='}{ast.unparse(default)}"


def _text(docstring: str) -> Iterator[str]:
    """A docstring as Markdown: its sections ("Args:") become lists."""
    items: list[str] = []
    section = ""
    for line in docstring.splitlines():
        if re.fullmatch(r"(Args|Attributes|Returns|Raises|Yields):", line):
            yield from (*items, f"**{line}**", "")
            items, section = [], line
        elif section in ("Returns:", "Yields:") and line.startswith("    "):
            yield line.strip()
        elif re.match(r"    \S", line):
            name, colon, rest = line.strip().partition(": ")
            known = colon and re.fullmatch(r"[\w*]+(, [\w*]+)*", name)
            items.append(f"- `{name}`: {rest}" if known else f"- {line.strip()}")
        elif items and line.startswith("        "):
            items[-1] += f" {line.strip()}"
        elif items and not line.strip():
            yield from (*items, "")
            items = []
        else:
            yield line
    yield from (*items, "")


def _errors() -> Iterator[str]:
    for node in ast.parse((PACKAGE / "errors.py").read_text()).body:
        if isinstance(node, ast.ClassDef):
            bases = ", ".join(f"`{ast.unparse(base)}`" for base in node.bases)
            what = (ast.get_docstring(node) or "").partition("\n\n")[0]
            yield f"| `{node.name}` | {bases} | {' '.join(what.split())} |"
