"""The protocol reference, from the sources of `protocol/`: docstrings, fields, and the comments behind them."""

from __future__ import annotations

import ast
import dataclasses
import io
import json
import tokenize
from collections.abc import Iterator
from pathlib import Path

import msgpack

from protocol.codec import HIGH_WATER, MAX_FRAME, MAX_HEADER, MAX_SUBMIT
from protocol.messages import PROTOCOL, PROTOCOL_OLDEST
from tables import code, table

ROOT = Path(__file__).resolve().parents[2]
MESSAGES = ROOT / "protocol" / "messages"
GROUPS = ("opening", "requests", "steps")
LONGEST_EXAMPLE = 400  # characters

INTRO = f"""# The protocol

What the services say to one another, made from the message types (`make docs`). The links, sessions and epochs that
carry it are told in [architecture](../architecture.md), the code is `protocol/`.

This is version {PROTOCOL}; version {PROTOCOL_OLDEST} is understood too. A HELLO names the oldest and the newest version that
its sender speaks, the scheduler takes the newest that both do.

## On the wire

A message is one or two ZeroMQ frames, `[header]` or `[header, body]`; both are plain MessagePack. A header is at most
{MAX_HEADER} bytes, a body at most {MAX_FRAME >> 20} MiB, and a socket queues at most {HIGH_WATER:,} messages. What is larger, has
another number of frames, does not decode, or fails its `check()`, is dropped and counted before anything of it is used.
A SUBMIT is at most {MAX_SUBMIT >> 20} MiB: a frontend fails a request that takes more (413, `request_too_large`), and a scheduler admits no
more choices in one plan than its frame holds.

| link | sockets |
|---|---|
| frontend – scheduler | the frontend's DEALER, the scheduler's ROUTER for frontends |
| worker – scheduler | the worker's two DEALERs (plans, results), the scheduler's ROUTER for workers |
| figures, spans | each service's PUB, the admin server's SUB; lossy, and never state |
"""


@dataclasses.dataclass
class Struct:
    """A message type, or a part of one, as its source tells it."""

    name: str
    base: str
    tag: str
    text: str
    fields: list[tuple[str, str, str, str]]  # name, type, default, comment


def messages_page() -> str:
    """Markdown of the whole protocol."""
    lines = [INTRO, *_header(), *_module_text(), "## Overview", ""]
    groups = {group: list(_structs(MESSAGES / f"{group}.py")) for group in GROUPS}
    rows = []
    for structs in groups.values():
        rows += [(f"[{s.name}](#{s.name.lower()})", code(s.tag), _first_sentence(s.text)) for s in structs if s.tag]
    lines += [*table(("message", "tag", ""), rows), ""]
    lines += ["## Parts", "", "Structures that occur inside messages, as arrays without a tag.", ""]
    for struct in (*_structs(MESSAGES / "base.py"), *(s for structs in groups.values() for s in structs if not s.tag)):
        if struct.fields and struct.base in ("Part", "Message"):
            lines += _section(struct, "")
    for group, structs in groups.items():
        lines += [f"## {_title(group)}", ""]
        for struct in structs:
            if struct.tag:
                lines += _section(struct, _example(struct))
    lines += _times()
    return "\n".join(lines).rstrip() + "\n"


def _header() -> list[str]:
    header = next(s for s in _structs(ROOT / "protocol" / "codec.py") if s.name == "Header")
    return ["### Header", "", header.text, "", *_fields(header), ""]


def _module_text() -> list[str]:
    """The conventions and words at the head of the package, as Markdown."""
    text = ast.get_docstring(ast.parse((MESSAGES / "__init__.py").read_text())) or ""
    lines: list[str] = []
    for block in text.split("\n\n")[1:]:
        head, *rest = block.splitlines()
        lines += [f"### {head}", ""]
        if rest[0].strip().startswith("*"):
            lines += [line.strip().replace("* ", "- ", 1) if line.strip().startswith("*") else f"  {line.strip()}" for line in rest]
        else:
            lines += table(("word", ""), (line.strip().split(None, 1) for line in rest))
        lines.append("")
    return lines


def _structs(path: Path) -> Iterator[Struct]:
    source = path.read_text()
    comments = _comments(source)
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        tags = [keyword.value.value for keyword in node.keywords if keyword.arg == "tag" and isinstance(keyword.value, ast.Constant)]
        fields = [
            (
                item.target.id,
                ast.unparse(item.annotation),
                "" if item.value is None else ast.unparse(item.value),
                comments.get(item.end_lineno or 0, ""),
            )
            for item in node.body
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
        ]
        base = ast.unparse(node.bases[0]) if node.bases else ""
        yield Struct(node.name, base, str(tags[0]) if tags else "", ast.get_docstring(node) or "", fields)


def _comments(source: str) -> dict[int, str]:
    """By line, the comment behind the code."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}


def _section(struct: Struct, example: str) -> list[str]:
    lines = [f"### {struct.name}", ""]
    if struct.tag:
        lines += [f"Tag {code(struct.tag)}. {struct.text}", ""]
    else:
        lines += [struct.text, ""]
    return lines + (_fields(struct) if struct.fields else ["No fields."]) + [""] + ([example, ""] if example else [])


def _fields(struct: Struct) -> list[str]:
    rows = [(str(i), code(name), code(kind), code(default), comment) for i, (name, kind, default, comment) in enumerate(struct.fields, 1)]
    return table(("", "field", "type", "default", ""), rows)


def _example(struct: Struct) -> str:
    """One message of the golden file, decoded, if it is short."""
    golden = json.loads((ROOT / "tests" / "data" / "messages.json").read_text())
    for name in (f"{struct.name.lower()}, full", struct.name.lower()):
        if name in golden:
            shown = _plain(msgpack.unpackb(bytes.fromhex(golden[name])))
            if len(shown) <= LONGEST_EXAMPLE:
                return f"Example, {len(golden[name]) // 2} bytes: `{shown}`"
    return ""


def _plain(value: object) -> str:
    if isinstance(value, bytes):
        return f"<{len(value)} B>"
    if isinstance(value, list):
        return "[" + ", ".join(map(_plain, value)) + "]"
    return json.dumps(value)


def _title(group: str) -> str:
    text = ast.get_docstring(ast.parse((MESSAGES / f"{group}.py").read_text())) or group
    return text.splitlines()[0].rstrip(".")


def _first_sentence(text: str) -> str:
    return text.split("\n\n")[0].replace("\n", " ").split(". ")[0].rstrip(".")


def _times() -> list[str]:
    struct = next(_structs(ROOT / "protocol" / "times.py"))
    rows = [(code(name), default, comment) for name, _, default, comment in struct.fields]
    text = "Seconds; `protocol/times.py` holds them all, and a hidden flag scales them for tests."
    return ["## Times", "", text, "", *table(("", "seconds", ""), rows), ""]
