"""Streams as they stand on the wire: what is asked, over a scripted scheduler that samples the oracle's tokens.

    python -m tests.frontend.transcripts

writes `tests/data/sse/NAME.txt`. Run it only when the wire is meant to change. Request ids are numbered, the time is 0.
"""

from __future__ import annotations

import asyncio
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import httpx

from frontend.server import make_app
from gpu_worker.oracle import expected
from protocol.columns import unpack
from protocol.messages import Failed, Submit
from tests.frontend.fakes import EOS, Engine, LocalClient, settings_for

FOLDER = Path(__file__).parents[1] / "data" / "sse"

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TALK = {"messages": [{"role": "user", "content": "hi"}], "seed": 1, "max_tokens": 4, "ignore_eos": True}
TEXT = {"prompt": "hi!", "seed": 1, "max_tokens": 4, "ignore_eos": True}
USAGE = {"include_usage": True}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, TALK),
    "chat-usage": (CHAT, {**TALK, "stream_options": USAGE}),
    "chat-continuous-usage": (CHAT, {**TALK, "n": 2, "max_tokens": 2, "stream_options": {**USAGE, "continuous_usage_stats": True}}),
    "chat-three-choices": (CHAT, {**TALK, "n": 3, "max_tokens": 2}),
    "chat-logprobs": (CHAT, {**TALK, "max_tokens": 2, "logprobs": True, "top_logprobs": 1}),
    "chat-token-ids": (CHAT, {**TALK, "max_tokens": 2, "return_token_ids": True}),
    "chat-goes-on": (
        CHAT,
        {**TALK, "messages": [*TALK["messages"], {"role": "assistant", "content": "I"}], "continue_final_message": True},  # type: ignore[misc]
    ),
    "completion": (COMPLETIONS, TEXT),
    "completion-usage": (COMPLETIONS, {**TEXT, "stream_options": USAGE}),
    "completion-many-prompts": (COMPLETIONS, {**TEXT, "prompt": ["a", "b"], "n": 2, "max_tokens": 1}),
    "completion-logprobs": (COMPLETIONS, {**TEXT, "max_tokens": 2, "logprobs": 1}),
    "completion-echo": (COMPLETIONS, {**TEXT, "echo": True, "max_tokens": 1}),
    "completion-echo-logprobs": (COMPLETIONS, {**TEXT, "echo": True, "logprobs": 1, "max_tokens": 1}),
    "completion-echo-alone": (COMPLETIONS, {**TEXT, "echo": True, "logprobs": 0, "max_tokens": 0, "stream_options": USAGE}),
    "completion-token-ids": (COMPLETIONS, {**TEXT, "max_tokens": 2, "return_token_ids": True}),
    "completion-stop-string": (COMPLETIONS, {**TEXT, "stop": "STOP", "max_tokens": 20}),
    "completion-eos": (COMPLETIONS, {**TEXT, "ignore_eos": False, "max_tokens": 9, "stream_options": USAGE}),
    "completion-characters": (COMPLETIONS, {**TEXT, "prompt": "characters", "max_tokens": 6}),
    "completion-error": (COMPLETIONS, {**TEXT, "prompt": "error", "max_tokens": 9}),
}

SCRIPTS = {
    "completion-stop-string": [*b"go STOP now"],
    "completion-eos": [*b"end", EOS],
    "completion-characters": [*"aé€".encode()],
}


class Script(Engine):
    """Samples the oracle's tokens, or a case's own; the case "completion-error" fails behind its third."""

    def __init__(self, name: str) -> None:
        super().__init__(self._token)
        self._name = name

    def _token(self, submit: Submit, choice: int, position: int) -> int:
        if self._name == "completion-error" and position == 3:
            self.out.append(Failed(submit.request, 500, "nan", "The model's output for this request is not a number."))
            self.paused = True
        if self._name in SCRIPTS:
            script = SCRIPTS[self._name]
            return script[min(position, len(script) - 1)]
        prompt, seed = unpack(submit.prompt).tolist(), submit.choices[choice].seed
        return expected(prompt, seed, position + 1, (), temperature=submit.params.temperature)[position]


def transcript(name: str) -> str:
    """The stream of a case."""
    path, body = CASES[name]

    async def main(folder: Path) -> httpx.Response:
        client = LocalClient(settings_for(folder), Script(name))
        await client.start()
        transport = httpx.ASGITransport(make_app(client), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=20) as http:
            answer = await http.post(path, json={**body, "stream": True})
        await client.stop()
        return answer

    with tempfile.TemporaryDirectory() as folder:
        answer = asyncio.run(main(Path(folder)))
    names: dict[str, str] = {}
    text = re.sub(r"[0-9a-f]{32}", lambda match: names.setdefault(match[0], f"REQUEST{len(names) + 1}"), answer.text)
    text = re.sub(r'"created":\d+', '"created":0', text)
    asked = json.dumps({**body, "stream": True}, ensure_ascii=False)
    return f"POST {path}\n{asked}\n\n{answer.status_code} {answer.headers['content-type']}\n\n{text}"


def main() -> None:
    """Write every case."""
    FOLDER.mkdir(exist_ok=True)
    for name in CASES:
        (FOLDER / f"{name}.txt").write_text(transcript(name))


if __name__ == "__main__":
    main()
