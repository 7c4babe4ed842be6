"""Chat templates: messages to the prompt that the model was trained on.

The environment is the one that model authors write for (Hugging Face's chat templates): a sandbox without mutation,
trimmed blocks, loop controls, `tojson`, `raise_exception`, `strftime_now`. Templates come with the model, never from a
request.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from frontend.conversation import TemplateError, check_shown, plain_messages

__all__ = ["ChatTemplate", "TemplateError"]

MAX_RENDERED = 16 << 20  # characters; more than any context holds
_MARK = "\uf8ff\uf8fe\uf8ff "  # private-use characters, and a space that shows whether the template trims content


class ChatTemplate:
    """A model's chat template. Compiled when first used, so that a broken one harms chat alone."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        """`special_tokens`: what the template may name, e.g. `bos_token` → "<s>"."""
        self._source = source
        self._special = dict(special_tokens or {})

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """The prompt for `messages` (role, content as a string or a list of text parts, tool calls, and what else the template reads).

        continue_final_message: the prompt ends inside the last message, for the model to go on with it; then
        add_generation_prompt must be False. `kwargs` are passed to the template. Raises TemplateError.
        """
        taken = {"messages", *self._special} & kwargs.keys()
        if taken:
            raise TemplateError(f"{min(taken)!r} is set by the server", "chat_template_kwargs")
        if not messages:
            raise TemplateError("messages must hold at least one message")
        chat = plain_messages(messages, self._compiled[1])
        values = {**self._special, **kwargs, "add_generation_prompt": add_generation_prompt}
        if continue_final_message and add_generation_prompt:
            raise TemplateError("cannot be combined with add_generation_prompt", "continue_final_message")
        text = self._continue(chat, values) if continue_final_message else self._render({**values, "messages": chat})
        check_shown(chat, text)
        return text

    def _continue(self, chat: list[dict[str, Any]], values: dict[str, Any]) -> str:
        content = chat[-1].get("content")
        if not content:
            raise TemplateError("the last message has no content to continue", "continue_final_message")
        marked = [*chat[:-1], {**chat[-1], "content": content + _MARK}]
        whole = self._render({**values, "messages": marked})
        end = whole.rfind(_MARK.strip())
        if end < 0:
            raise TemplateError("the chat template does not show the last message's content", "continue_final_message")
        trims = not whole.startswith(_MARK, end)
        return whole[:end].rstrip() if trims else whole[:end]

    def _render(self, values: dict[str, Any]) -> str:
        parts, length = [], 0
        try:
            for part in self._compiled[0].generate(values):
                length += len(part)
                if length > MAX_RENDERED:
                    raise TemplateError(f"the rendered chat is longer than {MAX_RENDERED} characters")
                parts.append(part)
        except TemplateError:
            raise
        except jinja2.TemplateError as error:
            raise TemplateError(f"the chat template refuses the messages: {error.message}") from error
        except Exception as error:  # a template can raise whatever Python can
            raise TemplateError(f"the chat template cannot render the messages: {error}") from error
        return "".join(parts)

    @functools.cached_property
    def _compiled(self) -> tuple[jinja2.Template, frozenset[str]]:
        """The template, and the names that it looks up."""
        environment = _environment()
        try:
            tree = environment.parse(self._source)
            reads = _lookups(tree)
            return environment.from_string(tree), reads
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"the model's chat template is broken, line {error.lineno}: {error.message}") from error
        except Exception as error:  # nested too deep
            raise TemplateError(f"the model's chat template is broken: {error}") from error


def _lookups(tree: jinja2.nodes.Template) -> frozenset[str]:
    """Every name that a template looks up in something: `m.name`, `m['name']`, `'name' in m`, `m.get('name')`."""
    values: list[jinja2.nodes.Node] = [item.arg for item in tree.find_all(jinja2.nodes.Getitem)]
    values += [compared.expr for compared in tree.find_all(jinja2.nodes.Compare)]
    values += [call.args[0] for call in tree.find_all(jinja2.nodes.Call) if call.args]
    names = {value.value for value in values if isinstance(value, jinja2.nodes.Const) and isinstance(value.value, str)}
    return frozenset(names | {lookup.attr for lookup in tree.find_all(jinja2.nodes.Getattr)})


class _Generation(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}` marks what a model is trained on; here it is just its content."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    # Jinja's own filter escapes HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
