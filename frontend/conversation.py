"""The messages of a conversation, from what OpenAI's clients send to what chat templates expect.

As in the body around them, nothing is dropped in silence: a field that holds something and that the model's template does not
read is refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec

BASIC = ("role", "content")
EMPTY: tuple[Any, ...] = ("", [], {})
IGNORED = ("name", "tool_call_id")  # say whose a message is; without effect where the template does not show them
_PARTS = ("text", "refusal")


class TemplateError(ValueError):
    """Messages that the template cannot render; `param` names the field at fault, `code` is the API's."""

    def __init__(self, why: str, param: str = "messages", code: str = "invalid_value") -> None:
        super().__init__(why)
        self.param = param
        self.code = code


def plain_messages(messages: Sequence[Mapping[str, Any]], reads: Collection[str]) -> list[dict[str, Any]]:
    """Messages with their content as one string, without other fields that hold nothing, and with the arguments of tool calls as objects.

    `reads`: the fields that the template looks at. Content may be absent beside tool calls, then it is empty. Raises TemplateError.
    """
    return [_plain(message, f"messages[{i}]", reads) for i, message in enumerate(messages)]


def check_shown(messages: Sequence[Mapping[str, Any]], text: str) -> None:
    """Demand of a rendered chat that it names the functions that were called. Raises TemplateError.

    A template may look for tool calls in a place of its own, e.g. only in messages whose content is null.
    """
    for i, message in enumerate(messages):
        for j, call in enumerate(message.get("tool_calls") or ()):
            if call["function"]["name"] not in text:
                where = f"messages[{i}].tool_calls[{j}]"
                raise TemplateError(f"{where}: the model's chat template does not show it", where)


def _plain(message: Mapping[str, Any], where: str, reads: Collection[str]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TemplateError(f"{where} must be an object", where)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise TemplateError(f"{where}.role must be a string", f"{where}.role")
    # A template may ask whether a field is there, and take an empty list of calls for one.
    plain = {key: value for key, value in message.items() if value is not None and (key in BASIC or value not in EMPTY)}
    for key, value in plain.items():
        if value and key not in reads and key not in BASIC and key not in IGNORED:
            why = f"{where}.{key} is not supported here: the model's chat template does not read it"
            raise TemplateError(why, f"{where}.{key}", "unsupported_parameter")
    if plain.get("tool_calls"):
        plain["tool_calls"] = _calls(plain["tool_calls"], f"{where}.tool_calls")
        plain.setdefault("content", "")
    plain["content"] = _content(plain.get("content"), f"{where}.content")
    return plain


def _content(content: Any, where: str) -> str:
    if content is None:
        raise TemplateError(f"{where} is missing", where)
    if isinstance(content, list):
        return "\n".join(_part_text(part, f"{where}[{i}]") for i, part in enumerate(content))
    if not isinstance(content, str):
        raise TemplateError(f"{where} must be a string or a list of parts", where)
    return content


def _part_text(part: Any, where: str) -> str:
    if not isinstance(part, Mapping):
        raise TemplateError(f"{where} must be an object", where)
    kind = part.get("type")
    if kind not in _PARTS:
        raise TemplateError(f"{where}.type: {kind!r} is not supported, only text is", f"{where}.type")
    text = part.get(kind)
    if not isinstance(text, str):
        raise TemplateError(f"{where}.{kind} must be a string", f"{where}.{kind}")
    for key, value in part.items():
        if value and key not in ("type", kind):
            raise TemplateError(f"{where}.{key} is not supported here", f"{where}.{key}", "unknown_parameter")
    return text


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise TemplateError(f"{where} must be a list", where)
    return [_call(call, f"{where}[{i}]") for i, call in enumerate(calls)]


def _call(call: Any, where: str) -> dict[str, Any]:
    """A tool call with its arguments as an object, as templates expect them; OpenAI's API has them as JSON in a string."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise TemplateError(f"{where}.function must be an object", f"{where}.function")
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise TemplateError(f"{where}.function.name must be a string", f"{where}.function.name")
    arguments = function.get("arguments") or "{}"
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments)  # which refuses half a surrogate pair, as in the body around it
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, Mapping):
        at = f"{where}.function.arguments"
        raise TemplateError(f"{at} must be an object, as JSON in a string", at)
    return {**call, "function": {**function, "arguments": arguments}}
