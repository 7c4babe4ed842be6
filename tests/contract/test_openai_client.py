"""Clients that others wrote, pointed here: nothing but the base URL and the key is changed."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.environments import environment
from tests.e2e.stack import Stack, stack

pytestmark = [pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(480)]
KEY = "contract-key-0123456789"
LANGCHAIN = """
import sys
from langchain_openai import ChatOpenAI
url, key = sys.argv[1:]
llm = ChatOpenAI(base_url=url + "/v1", api_key=key, model=sys.stdin.read(), temperature=0, max_tokens=24)
whole = llm.invoke("What is the capital of France?").content
assert "Paris" in whole, whole
assert "".join(chunk.content for chunk in llm.stream("What is the capital of France?")) == whole
"""
LITELLM = """
import sys, litellm
url, key = sys.argv[1:]
ask = dict(model="openai/" + sys.stdin.read(), api_base=url + "/v1", api_key=key, temperature=0, max_tokens=24,
           messages=[{"role": "user", "content": "What is the capital of France?"}])
whole = litellm.completion(**ask).choices[0].message.content
assert "Paris" in whole, whole
assert "".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(stream=True, **ask)) == whole
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Stack]:
    with stack() as made:
        keys = made.folder / "keys"
        keys.write_text(f"contract {KEY}\n")
        made.up("--api-key-file", str(keys), "--served-model-name", "small")
        yield made


def client(python: Path, arguments: list[str], server: Stack) -> None:
    ended = subprocess.run([str(python), *arguments, server.url, KEY], capture_output=True, text=True, input="small", timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("requirement", ["openai", "openai<2"])
def test_the_official_client_works_unchanged(requirement: str, server: Stack) -> None:
    client(environment(requirement), [str(Path(__file__).with_name("openai_client.py"))], server)


def test_langchain_works_unchanged(server: Stack) -> None:
    client(environment("langchain-openai"), ["-c", LANGCHAIN], server)


def test_litellm_works_unchanged(server: Stack) -> None:
    client(environment("litellm"), ["-c", LITELLM], server)
