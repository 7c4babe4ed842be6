"""What the official client must be able to do here. Run by `test_openai_client.py` in an environment of its own.

python openai_client.py URL KEY
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import openai

QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


def raised(kind: type[openai.APIStatusError], call: Any) -> openai.APIStatusError:
    """The error that a call ends with."""
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def same_answer_streamed_and_not(client: openai.OpenAI, model: str) -> None:
    whole = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=24)
    text, reasons, roles, usage = "", [], [], None
    for chunk in client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, max_tokens=24, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            roles += [choice.delta.role] if choice.delta.role else []
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert "Paris" in (whole.choices[0].message.content or ""), whole
    assert text == whole.choices[0].message.content
    assert roles == ["assistant"]
    assert reasons == [whole.choices[0].finish_reason]
    assert usage is not None
    assert whole.usage is not None
    assert usage.total_tokens == whole.usage.total_tokens


def choices_logprobs_and_stops(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=QUESTION, n=2, seed=3, max_completion_tokens=6, logprobs=True, top_logprobs=5
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    content = answer.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content
    assert len(content[0].top_logprobs) == 5
    assert all(item.logprob <= 0 for item in content)
    stopped = client.completions.create(model=model, prompt="one two three four", stop=[" "], max_tokens=20, temperature=0)
    assert " " not in stopped.choices[0].text
    first = client.completions.create(model=model, prompt="Once", seed=5, max_tokens=8, temperature=1)
    again = client.completions.create(model=model, prompt="Once", seed=5, max_tokens=8, temperature=1)
    assert first.choices[0].text == again.choices[0].text
    biased = client.completions.create(model=model, prompt="Once", max_tokens=3, temperature=0, logit_bias={"30": 100}, logprobs=1)
    assert len(set(biased.choices[0].logprobs.tokens or [])) == 1  # type: ignore[union-attr]


def completions_of_many_prompts(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(model=model, prompt=["The sea", "The sky"], max_tokens=5, echo=True, temperature=0)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[1].text.startswith("The sky")
    texts = {0: "", 1: ""}
    for chunk in client.completions.create(model=model, prompt=["The sea", "The sky"], max_tokens=5, echo=True, temperature=0, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert list(texts.values()) == [choice.text for choice in answer.choices]


def a_conversation_goes_on_with_the_clients_own_messages(client: openai.OpenAI, model: str) -> None:
    """The client's message objects go back as they came: with null fields, and those that OpenAI's own service fills."""
    said = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=8).choices[0].message
    again = {"role": "user", "content": [{"type": "text", "text": "And of Spain?"}], "name": "ann"}
    history: list[Any] = [*QUESTION, said, again]
    assert client.chat.completions.create(model=model, messages=history, max_tokens=2).choices[0].message.content
    history[1] = said.model_dump() | {"annotations": []}
    assert client.chat.completions.create(model=model, messages=history, max_tokens=2).choices[0].message.content
    called = {"id": "call_1", "type": "function", "function": {"name": "capital", "arguments": '{"of": "Spain"}'}}
    history[1] = {"role": "assistant", "content": None, "tool_calls": [called]}
    # The template of the model that is served does not know tool calls.
    bad = raised(openai.BadRequestError, lambda: client.chat.completions.create(model=model, messages=history, max_tokens=2))
    assert bad.param == "messages[1].tool_calls", bad


def errors_have_their_types(client: openai.OpenAI, model: str, url: str) -> None:
    bad = raised(openai.BadRequestError, lambda: client.completions.create(model=model, prompt="x", temperature=-1))
    assert bad.param == "temperature", bad
    raised(openai.NotFoundError, lambda: client.completions.create(model="nobody", prompt="x"))
    raised(openai.NotFoundError, lambda: client.embeddings.create(model=model, input="x"))
    stranger = openai.OpenAI(base_url=f"{url}/v1", api_key="a-key-that-nobody-has", max_retries=0)
    raised(openai.AuthenticationError, stranger.models.list)


async def asynchronous(url: str, key: str, model: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
        whole = await client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=24)

        async def streamed() -> str:
            stream = await client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=24, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        assert await asyncio.gather(*(streamed() for _ in range(4))) == [whole.choices[0].message.content] * 4


def main() -> None:
    """Raises AssertionError where the contract is broken."""
    url, key = sys.argv[1:]
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    model = client.models.list().data[0].id
    assert client.models.retrieve(model).id == model
    same_answer_streamed_and_not(client, model)
    choices_logprobs_and_stops(client, model)
    completions_of_many_prompts(client, model)
    a_conversation_goes_on_with_the_clients_own_messages(client, model)
    errors_have_their_types(client, model, url)
    asyncio.run(asynchronous(url, key, model))
    print(f"openai {openai.__version__}: passed")


if __name__ == "__main__":
    main()
