"""Chat templates: what model authors may use, what clients may send, and what is refused with which words."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from frontend import templates
from frontend.templates import ChatTemplate, TemplateError

USER = {"role": "user", "content": "Hi"}
PLAIN = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
TRIMMING = "{% for message in messages %}[{{ message.role }}]{{ message.content | trim }}<end>{% endfor %}"


def render(source: str, *messages: dict[str, Any], special: dict[str, str] | None = None, **options: Any) -> str:
    return ChatTemplate(source, special).render(messages or [USER], **options)


def test_messages_become_the_prompt() -> None:
    assert render(PLAIN, USER, {"role": "assistant", "content": "Hello"}, USER) == "[user]Hi[assistant]Hello[user]Hi[assistant]"
    assert render(PLAIN, USER, add_generation_prompt=False) == "[user]Hi"


def test_text_parts_are_joined_by_line() -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}
    assert render(PLAIN, message, add_generation_prompt=False) == "[user]one\ntwo"
    assert render(PLAIN, {"role": "user", "content": []}, add_generation_prompt=False) == "[user]"


def test_absent_fields_are_not_there_for_the_template() -> None:
    source = "{{ messages[0].name is defined }} {{ messages[0].tool_calls is defined }}"
    assert render(source, {"role": "assistant", "content": "x", "name": None, "tool_calls": None}) == "False False"


def test_content_is_data_and_never_a_template() -> None:
    assert (
        render(PLAIN, {"role": "user", "content": "{{ 7 * 7 }} {% raw %} <b>&"}, add_generation_prompt=False)
        == "[user]{{ 7 * 7 }} {% raw %} <b>&"
    )


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% if true %}\n  a\n    {% endif %}\nb", "  a\nb"),  # trim_blocks and lstrip_blocks
        (
            "{% for m in [1, 2, 3, 4] %}{% if m == 2 %}{% continue %}{% endif %}{% if m == 4 %}{% break %}{% endif %}{{ m }}{% endfor %}",
            "13",
        ),
        ("{{ {'b': '<é>', 'a': [1, none]} | tojson }}", '{"b": "<é>", "a": [1, null]}'),
        ("{{ {'a': 1} | tojson(indent=2) }}", '{\n  "a": 1\n}'),
        ("{% set ns = namespace(n=0) %}{% for m in [1, 2] %}{% set ns.n = ns.n + m %}{% endfor %}{{ ns.n }}", "3"),
        ("{% generation %}inner{{ 1 }}{% endgeneration %}!", "inner1!"),
        ("{{ bos_token }}{{ missing }}{{ extra }}", "<s>more"),
    ],
)
def test_templates_find_what_their_authors_expect(source: str, text: str) -> None:
    assert render(source, special={"bos_token": "<s>"}, extra="more") == text


def test_the_date_is_at_hand() -> None:
    assert render("{{ strftime_now('%Y') }}") in {str(datetime.now().year), str(datetime.now().year - 1)}


def test_the_authors_own_refusals_are_passed_on() -> None:
    with pytest.raises(TemplateError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'a': 1}) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{% include 'x' %}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises(TemplateError):
        render(source)


def test_internals_are_not_shown() -> None:
    assert render("{{ messages.__class__ }}{{ raise_exception.__globals__ }}|") == "|"


def test_a_rendering_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "MAX_RENDERED", 1000)
    with pytest.raises(TemplateError, match="longer than 1000"):
        render("{% for i in range(1000) %}{% for j in range(1000) %}xxxx{% endfor %}{% endfor %}")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("a\n{% if %}", "template is broken, line 2"),
        ("a\n{{ 1 | nothing }}", "template is broken, line 2: No filter named 'nothing'"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "template is broken: maximum recursion"),
        ("{{ messages[0].content + missing }}", "refuses the messages: 'missing' is undefined"),
        ("{{ 1 / 0 }}", "cannot render the messages: division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "cannot render the messages: maximum recursion"),
    ],
)
def test_a_template_that_fails_says_why(source: str, words: str) -> None:
    with pytest.raises(TemplateError, match=words):
        render(source)


@pytest.mark.parametrize(
    ("message", "param", "words"),
    [
        ("Hi", "messages[1]", "must be an object"),
        ({"content": "x"}, "messages[1].role", "must be a string"),
        ({"role": "", "content": "x"}, "messages[1].role", "must be a string"),
        ({"role": "user"}, "messages[1].content", "is missing"),
        ({"role": "user", "content": 3}, "messages[1].content", "string or a list"),
        ({"role": "user", "content": ["x"]}, "messages[1].content[0]", "must be an object"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[1].content[0].text", "must be a string"),
        (
            {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "u"}}]},
            "messages[1].content[1].type",
            "'image_url' is not supported, only text is",
        ),
    ],
)
def test_a_bad_message_is_named(message: Any, param: str, words: str) -> None:
    with pytest.raises(TemplateError, match=words) as caught:
        render(PLAIN, USER, message)
    assert caught.value.param == param
    assert param in str(caught.value)


def test_no_messages_are_refused() -> None:
    with pytest.raises(TemplateError, match="at least one"):
        ChatTemplate(PLAIN).render([])


@pytest.mark.parametrize("name", ["messages", "bos_token"])
def test_what_the_server_sets_cannot_be_passed_in(name: str) -> None:
    with pytest.raises(TemplateError, match=f"'{name}' is set by the server") as caught:
        render(PLAIN, special={"bos_token": "<s>"}, **{name: "x"})
    assert caught.value.param == "chat_template_kwargs"


@pytest.mark.parametrize("content", ["one, two,", "ends in space ", "end", "[", " "])
def test_the_last_message_can_be_left_open_to_be_continued(content: str) -> None:
    options: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    last = {"role": "assistant", "content": content}
    assert render(PLAIN + "<end>", USER, last, **options) == f"[user]Hi[assistant]{content}"
    assert render(TRIMMING, USER, last, **options) == f"[user]Hi<end>[assistant]{content.rstrip()}"


@pytest.mark.parametrize(
    ("options", "last", "words"),
    [
        ({"add_generation_prompt": True}, "x", "cannot be combined"),
        ({"add_generation_prompt": False}, "", "no content to continue"),
    ],
)
def test_a_message_that_cannot_be_continued_is_refused(options: dict[str, Any], last: str, words: str) -> None:
    with pytest.raises(TemplateError, match=words) as caught:
        render(PLAIN, USER, {"role": "assistant", "content": last}, continue_final_message=True, **options)
    assert caught.value.param == "continue_final_message"


def test_a_template_that_hides_the_last_message_cannot_continue_it() -> None:
    with pytest.raises(TemplateError, match="does not show"):
        render("nothing", USER, add_generation_prompt=False, continue_final_message=True)
