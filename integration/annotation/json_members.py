"""Members of a JSON object set in its text, so that every other byte stays as it is.

Source: RFC 8259; names and values are read by Python's own ``json.JSONDecoder``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["set_members"]

DECODER = json.JSONDecoder()
SPACE = re.compile(r"[ \t\r\n]*")
LINE = re.compile(r"(\r?\n)([ \t]*)(?=[^\r\n]*\Z)")  # the last line end, and what indents after it


@dataclass(frozen=True)
class Member:
    """One member of an object, and where it stands in the text.

    Args:
        name: its name.
        value: its value.
        start: the first character of the name.
        colon: the first one after the name.
        value_start: the first one of the value.
        end: the first one after the value.
    """

    name: str
    value: Any
    start: int
    colon: int
    value_start: int
    end: int


def set_members(text: str, values: Mapping[str, Any], *, also_in: str) -> str:
    """Return the text of an object with some of its members set.

    A member that is there with another value has its value replaced where it stands, each time it
    stands there; one that has the value is left alone; one that is missing is put at the end,
    spaced as the last one is.

    Args:
        text: a JSON object.
        values: the members; JSON's own types.
        also_in: the name of a member that is an object: what it has of the members is replaced
            too, and nothing is added to it.

    Raises:
        ValueError: the text is no JSON object.

    Example:
        >>> set_members('{"a": 1,"b": 2}', {"b": True, "c": ["d"]}, also_in="")
        '{"a": 1,"b": true,"c": ["d"]}'

    Source:
        RFC 8259.
    """
    if not isinstance(json.loads(text), dict):
        raise ValueError("the top level must be an object")
    brace = _after_space(text, 0)
    top = _members(text, brace)
    edits = [_replacement(text, one, values, depth=1) for one in top if one.name in values]
    for outer in top:
        if outer.name == also_in and isinstance(outer.value, dict):
            inner = [one for one in _members(text, outer.value_start) if one.name in values]
            edits += [_replacement(text, one, values, depth=2) for one in inner]
    missing = {name: value for name, value in values.items() if name not in {x.name for x in top}}
    end = top[-1].end if top else brace + 1
    edits.append((end, end, _addition(text, brace, top, missing)))
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    return text


def _members(text: str, brace: int) -> list[Member]:
    """Return the members of the object whose brace is at ``brace``, in their order."""
    found = []
    at = _after_space(text, brace + 1)
    while text[at] != "}":
        name, colon = DECODER.raw_decode(text, at)
        value_start = _after_space(text, _after_space(text, colon) + 1)
        value, end = DECODER.raw_decode(text, value_start)
        found.append(Member(name, value, at, colon, value_start, end))
        at = _after_space(text, end)
        if text[at] == ",":
            at = _after_space(text, at + 1)
    return found


def _after_space(text: str, at: int) -> int:
    match = SPACE.match(text, at)
    return match.end() if match else at


def _replacement(
    text: str, member: Member, values: Mapping[str, Any], depth: int
) -> tuple[int, int, str]:
    """Return (start, end, new text) of a value; what has the value already keeps its spelling."""
    new = values[member.name]
    if json.dumps(member.value) == json.dumps(new):
        return member.value_start, member.end, text[member.value_start : member.end]
    line = LINE.search(text, 0, member.start)
    own_line = line is not None and line.end() == member.start
    comma = ", " if text[member.colon : member.value_start].endswith(" ") else ","
    return member.value_start, member.end, _as_text(new, line if own_line else None, comma, depth)


def _addition(text: str, brace: int, top: Sequence[Member], missing: Mapping[str, Any]) -> str:
    """Return the text of new members, to stand after the last one."""
    if not top:
        return json.dumps(dict(missing))[1:-1]
    last = top[-1]
    before = top[-2].end if len(top) > 1 else brace + 1
    separator = ("" if len(top) > 1 else ",") + text[before : last.start]
    colon = text[last.colon : last.value_start]
    line = LINE.search(separator)
    comma = ", " if colon.endswith(" ") else ","
    return "".join(
        separator + json.dumps(name) + colon + _as_text(value, line, comma, depth=1)
        for name, value in missing.items()
    )


def _as_text(value: object, line: re.Match[str] | None, comma: str, depth: int) -> str:
    """Return a value's text: a list has a line for each item where its member has a line."""
    if not isinstance(value, list) or not value:
        return json.dumps(value)
    items = [json.dumps(item) for item in value]
    if line is None:
        return f"[{comma.join(items)}]"
    end, indent = line.groups()
    deeper = end + indent + indent[: len(indent) // depth]
    return "[" + ",".join(deeper + item for item in items) + end + indent + "]"
