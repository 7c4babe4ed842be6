"""`pagewire chat`: a conversation in the terminal, streamed, with any OpenAI-compatible server."""

from __future__ import annotations

import contextlib
import http.client
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from pagewire.finding import api_option, find_api
from protocol.options import CONTEXT, Number, run_dir_option

HELP = (
    "/new forgets the conversation, /system TEXT begins a new one with that system prompt, /quit or Ctrl-D leaves; Ctrl-C stops an answer."
)


class ChatError(RuntimeError):
    """The server could not be reached or refused; the text is its own where it gave one."""


class Conversation:
    """What has been said, and how to go on. `tokens` and `seconds` are of the last answer."""

    def __init__(self, url: str, key: str = "", system: str = "", options: dict[str, Any] | None = None) -> None:
        """options: fields of every request, such as model and temperature."""
        self._url = url.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
        self._key = key
        self._options = options or {}
        self.messages: list[dict[str, str]] = []
        self.tokens = 0
        self.seconds = 0.0
        self.restart(system)

    def restart(self, system: str | None = None) -> None:
        """Forget what was said. system: another system prompt; None keeps the one there is, empty has none."""
        if system is None:
            self.messages = self.messages[:1] if self.messages and self.messages[0]["role"] == "system" else []
        else:
            self.messages = [{"role": "system", "content": system}] if system else []

    def ask(self, text: str) -> Iterator[str]:
        """Say something; yields the answer piece by piece. Raises ChatError, and then nothing was said.

        An answer that the caller stops reading counts as far as it came.
        """
        said = [*self.messages, {"role": "user", "content": text}]
        answer = ""
        started = time.monotonic()
        self.tokens = 0
        failed = False
        try:
            for piece in self._stream({**self._options, "messages": said}):
                answer += piece
                yield piece
        except ChatError:
            failed = True
            raise
        finally:
            self.seconds = time.monotonic() - started
            if not failed:
                self.messages = [*said, {"role": "assistant", "content": answer}]

    def _stream(self, body: dict[str, Any]) -> Iterator[str]:
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self._key}"} if self._key else {})}
        data = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
        done = False
        try:
            with contextlib.closing(urllib.request.urlopen(urllib.request.Request(self._url, data, headers))) as answer:
                for line in answer:
                    if not line.startswith(b"data:"):
                        continue
                    if (event := line[5:].strip()) == b"[DONE]":
                        done = True
                        break
                    yield from self._event(json.loads(event))
        except urllib.error.HTTPError as error:
            raise ChatError(_refusal(error)) from None
        except (LookupError, TypeError, AttributeError) as error:
            raise ChatError(f"{self._url}: no event of a chat completion: {error!r}") from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ChatError(f"{self._url}: {str(getattr(error, 'reason', error)).strip()}") from None
        if not done:
            raise ChatError("the server closed the stream before its end")

    def _event(self, event: dict[str, Any]) -> Iterator[str]:
        if error := event.get("error"):
            raise ChatError(str(error.get("message", error) if isinstance(error, dict) else error))
        if usage := event.get("usage"):
            self.tokens = usage["completion_tokens"]
        for choice in event.get("choices", ()):
            if piece := choice["delta"].get("content"):
                yield piece


def _refusal(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (OSError, ValueError, LookupError, TypeError, http.client.HTTPException):
        return f"status {error.code} {error.reason}"


@click.command(context_settings=CONTEXT)
@api_option
@run_dir_option
@click.option("--api-key", default="", envvar="OPENAI_API_KEY", help="Sent as a bearer token.")
@click.option("--model", default="", show_default="the server's first", help="Name of the model.")
@click.option("--system", default="", help="System prompt.")
@click.option("--temperature", type=Number(0), help="Of sampling.  [default: the model's]")
@click.option("--max-tokens", type=click.IntRange(1), help="Of each answer.  [default: what the context holds]")
@click.option("--stats", is_flag=True, help="After each answer, its tokens, seconds and speed.")
def main(
    url: str, run_dir: Path, api_key: str, model: str, system: str, temperature: float | None, max_tokens: int | None, stats: bool
) -> None:
    """Talk with a model in the terminal."""
    url = find_api(url, run_dir)
    options = {"model": model or _first_model(url, api_key), "temperature": temperature, "max_tokens": max_tokens}
    talk = Conversation(url, api_key, system, {name: value for name, value in options.items() if value is not None})
    asked = sys.stdin.isatty()
    if asked:
        import readline  # noqa: F401  (makes `input` editable, with a history)

        click.secho(f"{options['model']} at {url}. {HELP}", dim=True)
    failed = False
    while True:
        try:
            text = input("> " if asked else "").strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            click.echo()
            continue
        if text in ("/quit", "/exit"):
            break
        if text:
            failed = not _one(talk, text, stats) or failed
    if asked:
        click.echo()
    elif failed:
        sys.exit(1)


def _one(talk: Conversation, text: str, stats: bool) -> bool:
    """A line that the user typed: a command, or something to be answered. False if the answer failed."""
    command, _, rest = text.partition(" ")
    if command == "/new":
        talk.restart()
    elif command == "/system":
        talk.restart(rest)
    elif command.startswith("/"):
        click.secho(HELP, dim=True)
    else:
        pieces = talk.ask(text)
        begun = False
        try:
            for piece in pieces:
                click.echo(piece, nl=False)
                begun = True
            click.echo()
            if stats:
                click.secho(f"{talk.tokens} tokens in {talk.seconds:.2f} s, {talk.tokens / max(talk.seconds, 1e-9):.1f} tok/s", dim=True)
        except KeyboardInterrupt:
            pieces.close()  # type: ignore[attr-defined]
            click.secho(" (stopped)", dim=True)
        except ChatError as error:
            click.echo(nl=begun)
            click.secho(f"{error}", fg="red", err=True)
            return False
    return True


def _first_model(url: str, key: str) -> str:
    address = url.rstrip("/").removesuffix("/v1") + "/v1/models"
    request = urllib.request.Request(address, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return str(json.load(answer)["data"][0]["id"])
    except urllib.error.HTTPError as error:
        raise click.ClickException(_refusal(error)) from None
    except (OSError, http.client.HTTPException) as error:
        raise click.ClickException(
            f"cannot reach {url}: {str(getattr(error, 'reason', error)).strip()}; is `pagewire up` running?"
        ) from None
    except (ValueError, LookupError, TypeError):
        raise click.ClickException(f"{address} lists no model; name one with --model") from None
