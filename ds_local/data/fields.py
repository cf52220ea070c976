"""The text of a row: in which field it is, and how messages of a chat become text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

TEXT_FIELDS = ("text",)
Chat = Callable[[Sequence[Mapping[str, Any]]], str]  # messages -> text


class Malformed(ValueError):
    """A row that has no text to read; the message says why."""


def plain_chat(messages: Sequence[Mapping[str, Any]]) -> str:
    """Messages as text for tokenizers without a chat template: "ROLE: CONTENT", a blank line
    between them."""
    return "\n\n".join(f"{one['role']}: {one['content']}" for one in messages)


def present(fields: Sequence[str], columns: Sequence[str]) -> str | None:
    """The first of `fields` that a table has; of a dotted one, its first part counts."""
    return next((f for f in fields if f in columns or f.partition(".")[0] in columns), None)


def text_of(
    row: Any,
    fields: Sequence[str],
    render: Chat = plain_chat,
) -> str | bytes | None:
    """The text of a row, None where it is null.

    Args:
        row: an object with fields, or a `Malformed` to be raised.
        fields: the first that the row has is taken; "a.b" is the field b of the object in a, unless
            a field has that name itself.
        render: makes text of messages, objects with "role" and "content".

    Raises:
        Malformed: when it is something else.
    """
    if isinstance(row, Malformed):
        raise row
    wanted = " or ".join(f'"{field}"' for field in fields)
    if not isinstance(row, dict):
        raise Malformed(f"is {type(row).__name__}, not an object with a {wanted} field")
    for field in fields:
        found, value = _find(row, field)
        if found:
            break
    else:
        names = ", ".join(map(str, row))[:200] or "none"
        raise Malformed(
            f"has the fields {names}; an object with a {wanted} field is needed (--text-field)"
        )
    if isinstance(value, list):
        return _rendered(value, field, render)
    if not isinstance(value, str | bytes | None):
        raise Malformed(f'"{field}" is {type(value).__name__}, not a string')
    return value


def _find(row: dict[str, Any], field: str) -> tuple[bool, Any]:
    """(is it there?, its value)"""
    if field in row:
        return True, row[field]
    first, _, rest = field.partition(".")
    inner = row.get(first) if rest else None
    return _find(inner, rest) if isinstance(inner, dict) else (False, None)


def _rendered(messages: list[Any], field: str, render: Chat) -> str:
    """Messages as text."""
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise Malformed(
                f'"{field}" is list, not a string, nor messages with "role" and "content"'
            )
        if not isinstance(message["content"], str):
            kind = type(message["content"]).__name__
            raise Malformed(f'"{field}" has a message whose "content" is {kind}, not a string')
    try:
        return render(messages) if messages else ""
    except Exception as error:  # a template raises what it likes
        lines = str(error).splitlines() or [type(error).__name__]
        raise Malformed(f'the chat template refuses "{field}": {lines[0]}') from error
