"""The pages of commands and settings, from click's parameters and `protocol/flags.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import click

from pagewire.admin import AdminSettings
from pagewire.cli import TEXTS, main
from pagewire.up import OWN, service_settings
from protocol.flags import FLAGS
from tables import code, table

INTRO = """# Commands

Every command and every flag, as `--help` prints them. This page is made from the code (`make docs`).

Where a flag has an environment variable it is named below; a flag goes before the environment, the environment before a
`--config` file, and that before the default. What the settings of the services mean is told once, in
[settings](settings.md).
"""

SETTINGS = """# Settings

Every setting of the services, made from the code (`make docs`). A setting is a flag (`--max-num-seqs 64`), an
environment variable (`PAGEWIRE_MAX_NUM_SEQS`, or `PAGEWIRE_WORKER_MAX_NUM_SEQS` for workers alone) or a line of a TOML file
(`max_num_seqs = 64`), looked for in this order. A switch is turned off by `--no-auth`, `PAGEWIRE_AUTH=false` or
`auth = false`. `pagewire up` and `pagewire serve` take those of all services, except the ones marked *own*, which belong to
one process: its name, endpoints and keys.

```toml
# pagewire.toml, for --config
port = 8000
max_num_seqs = 64

[worker]                # for workers alone
dtype = "float32"
```
"""


def commands_page() -> str:
    """Markdown of all commands."""
    context = click.Context(main, info_name="pagewire", color=False)
    lines = [INTRO]
    for name, command in _commands(main, context):
        sub = click.Context(command, info_name=name.removeprefix("pagewire "), parent=context)
        usage = " ".join(command.collect_usage_pieces(sub))
        lines += [f"## {name}", "", f"`{name} {usage}`", "", _text(command), ""]
        if name.removeprefix("pagewire ") in TEXTS and name != "pagewire up":
            lines += ["Its flags are those of [`pagewire up`](#pagewire-up), without `--model`.", ""]
            continue
        options = [param for param in command.params if isinstance(param, click.Option) and not param.hidden]
        lines += [*table(("flag", "", "default", "environment"), (_option(option, sub) for option in options)), ""]
    return "\n".join(lines).rstrip() + "\n"


def _commands(group: click.Group, context: click.Context, before: str = "pagewire") -> Iterator[tuple[str, click.Command]]:
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None, name
        if isinstance(command, click.Group):
            yield from _commands(command, context, f"{before} {name}")
        else:
            yield f"{before} {name}", command


def _text(command: click.Command) -> str:
    return (command.help or "").strip()


def _option(option: click.Option, context: click.Context) -> tuple[str, str, str, str]:
    names = "/".join([*option.opts, *option.secondary_opts])
    kind = "" if option.is_flag else option.make_metavar(context).removesuffix(" RANGE")
    text = option.help or ""
    default = str(option.get_help_extra(context).get("default", ""))
    if default.startswith("("):  # in words, not a value
        default = default[1:-1]
    if text.endswith("]") and "[default:" in text:
        text, _, default = text[:-1].rpartition("  [default: ")
    if isinstance(option.type, click.IntRange | click.FloatRange):
        text += bounds(option.type.min, option.type.max)
    variables = [option.envvar] if isinstance(option.envvar, str) else list(option.envvar or ())
    required = "*required*" if option.required else default
    return code(f"{names} {kind}".strip()), text, required, ", ".join(code(name) for name in variables)


def bounds(low: float | None, high: float | None) -> str:
    """A number's bounds as a sentence; nothing if it has none."""
    match low, high:
        case None, None:
            return ""
        case _, None:
            return f" {low:,} or more."
        case None, _:
            return f" {high:,} at most."
    return f" From {low:,} to {high:,}." if low != high else f" {low:,}."


def settings_page() -> str:
    """Markdown of all settings of the services."""
    takers: dict[str, dict[str, object]] = {}
    for role, settings in {**service_settings(), "admin": AdminSettings}.items():
        for field in dataclasses.fields(settings):
            takers.setdefault(field.name, {})[role] = field.default
    rows = []
    for name, flag in FLAGS.items():
        if flag.hidden:
            continue
        flag_name = flag.name or "--" + name.replace("_", "-")
        roles = takers.get(name) or {"up": next(field.default for field in OWN if field.name == name)}
        default = next(iter(roles.values()))
        if default is dataclasses.MISSING:
            shown = "one per working directory"
        else:
            shown = flag.empty if flag.empty and default in ("", 0) else str(default or "" if default == () else default)
        if len(set(map(str, roles.values()))) > 1:
            shown = "by service"
        values = ", ".join(map(code, flag.choices)) or bounds(flag.low, flag.high).strip("; .")
        rows.append((code(flag_name), flag.help + (" *own*" if flag.own else ""), values, shown, ", ".join(roles)))
    return "\n".join([SETTINGS, *table(("flag", "", "values", "default", "taken by"), rows)]) + "\n"
