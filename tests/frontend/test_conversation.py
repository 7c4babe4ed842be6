"""Histories as OpenAI's clients send them: tool calls and their results are rendered where the template can; what it does not
read is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from frontend.templates import ChatTemplate, TemplateError
from tests.frontend.asking import chat, error, post, submitted
from tests.frontend.fakes import Engine

PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m['content'] }}{% endfor %}"
WITH_CALLS = """\
{%- for m in messages %}
[{{ m.role }}{% if 'tool_call_id' in m %} {{ m.tool_call_id }}{% endif %}]
{%- if '</think>' in m.content %}thought{% endif %}
{{- '' + m.content }}
{%- for call in m.get('tool_calls', []) %}
<call {{ call.function.name }} {{ call.function.arguments | tojson }} {{ call.function.arguments.city }}>
{%- endfor %}
{%- endfor %}"""
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
ASKED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [CALL],
    "refusal": None,
    "annotations": [],
    "audio": None,
    "function_call": None,
}
HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "Warm?"},
    ASKED,
    {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "21 °C"}]},
]


def render(source: str, messages: list[dict[str, Any]] | None = None) -> str:
    return ChatTemplate(source).render(HISTORY if messages is None else messages)


def refused(source: str, message: dict[str, Any], param: str) -> TemplateError:
    with pytest.raises(TemplateError) as caught:
        render(source, [HISTORY[0], message])
    assert caught.value.param == param
    assert param in str(caught.value)
    return caught.value


def calling(**function: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [CALL, {"id": "2", "type": "function", "function": function}]}


def test_a_template_that_reads_tool_calls_is_given_them_with_arguments_as_objects() -> None:
    assert render(WITH_CALLS) == '[user]Warm?[assistant]<call weather {"city": "Paris"} Paris>[tool call_1]21 °C'


@pytest.mark.parametrize(("arguments", "shown"), [("", "{}"), (None, "{}"), ({"city": "Rome"}, '{"city": "Rome"}')])
def test_arguments_may_be_absent_or_an_object_already(arguments: Any, shown: str) -> None:
    assert f"<call f {shown}" in render(WITH_CALLS, [calling(name="f", arguments=arguments)])


def test_what_the_client_sent_is_not_changed() -> None:
    before = json.dumps(HISTORY)
    render(WITH_CALLS)
    assert json.dumps(HISTORY) == before


@pytest.mark.parametrize(
    ("function", "field"),
    [
        ({"name": "f", "arguments": "{"}, "function.arguments"),
        ({"name": "f", "arguments": "[1]"}, "function.arguments"),
        ({"name": "f", "arguments": 3}, "function.arguments"),
        ({"name": "f", "arguments": '{"a": "\\ud83d"}'}, "function.arguments"),
        ({"name": "f", "arguments": '{"a": NaN}'}, "function.arguments"),
        ({"name": "f", "arguments": "[" * 100_000}, "function.arguments"),
        ({"arguments": "{}"}, "function.name"),
        ({"name": ""}, "function.name"),
    ],
)
def test_a_call_that_is_none_is_named(function: dict[str, Any], field: str) -> None:
    refused(WITH_CALLS, calling(**function), f"messages[1].tool_calls[1].{field}")


@pytest.mark.parametrize("calls", [[3], [{}], [{"function": "f"}]])
def test_a_call_without_a_function_is_named(calls: list[Any]) -> None:
    refused(WITH_CALLS, {"role": "assistant", "tool_calls": calls}, "messages[1].tool_calls[0].function")


def test_calls_that_are_no_list_are_named() -> None:
    refused(WITH_CALLS, {"role": "assistant", "tool_calls": {"0": CALL}}, "messages[1].tool_calls")


def test_a_template_that_does_not_read_tool_calls_loses_none_in_silence() -> None:
    error = refused(PLAIN, ASKED, "messages[1].tool_calls")
    assert error.code == "unsupported_parameter"
    assert "the model's chat template does not read it" in str(error)
    elsewhere = "{% for m in messages %}{% if m.content is none %}{{ m.tool_calls }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    assert "does not show it" in str(refused(elsewhere, ASKED, "messages[1].tool_calls[0]"))


def test_results_of_tools_need_no_more_than_the_role() -> None:
    assert render(PLAIN, HISTORY[::2]) == "[user]Warm?[tool]21 °C"


def test_content_may_be_absent_beside_tool_calls_only() -> None:
    refused(WITH_CALLS, {"role": "assistant", "content": None, "tool_calls": []}, "messages[1].content")
    refused(WITH_CALLS, {"role": "tool", "tool_call_id": "call_1"}, "messages[1].content")


@pytest.mark.parametrize(
    ("field", "value"), [("reasoning_content", "hm"), ("function_call", {"name": "f"}), ("refusal", "no"), ("what", 1)]
)
def test_a_field_of_a_message_that_the_template_does_not_read_is_refused(field: str, value: Any) -> None:
    message = {"role": "assistant", "content": "x", field: value}
    refused(PLAIN, message, f"messages[1].{field}")
    for reads in (f"m.{field}", f"m['{field}']", f"m.get('{field}', '')", f"'{field}' in m"):
        assert render("{% for m in messages %}{{ " + reads + " }}|{% endfor %}", [message]) != "|"


def test_a_field_that_holds_nothing_is_no_reason_to_refuse() -> None:
    assert render(PLAIN, [{"role": "user", "content": "x", "name": "ann", "annotations": [], "what": None}]) == "[user]x"


@pytest.mark.parametrize("nothing", [None, "", [], {}])
@pytest.mark.parametrize("field", ["tool_calls", "reasoning_content", "tool_call_id"])
def test_a_template_does_not_find_a_field_that_holds_nothing(field: str, nothing: Any) -> None:
    source = (
        "{% for m in messages %}{% if '"
        + field
        + "' in m %}{{ m."
        + field
        + "[0].function }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    assert render(source, [{"role": "assistant", "content": "x", field: nothing}]) == "x"
    assert render("{{ 'content' in messages[0] }}", [{"role": "user", "content": ""}]) == "True"


@pytest.mark.parametrize("value", [False, 0])
def test_no_and_zero_are_values(value: Any) -> None:
    assert render("{{ messages[0].thinking }}", [{"role": "user", "content": "x", "thinking": value}]) == str(value)


def test_a_field_of_a_part_that_is_not_known_is_refused() -> None:
    part = {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}
    found = refused(PLAIN, {"role": "user", "content": [part]}, "messages[1].content[0].cache_control")
    assert found.code == "unknown_parameter"
    assert render(PLAIN, [{"role": "user", "content": [{**part, "cache_control": None}]}]) == "[user]x"


def test_the_api_answers_400_with_the_field(tmp_path) -> None:
    engine = Engine()
    refusal = error(chat(tmp_path, engine, messages=HISTORY), 400, "messages[1].tool_calls")
    assert refusal["code"] == "unsupported_parameter"
    assert not engine.live, "nothing may reach the scheduler"
    assert chat(tmp_path, engine, messages=HISTORY[::2]).status_code == 200
    assert submitted(engine).prompt[::4].startswith(b"user: Warm?\ntool: 21 ")
    error(post("/tokenize", {"messages": HISTORY}, tmp_path), 400, "messages[1].tool_calls")
