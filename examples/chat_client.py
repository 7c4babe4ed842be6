"""A streamed chat through the HTTP API, with the standard library alone: `python examples/chat_client.py URL QUESTION`."""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Iterator


def stream(url: str, question: str) -> Iterator[str]:
    """The pieces of the answer as they come."""
    body = {"messages": [{"role": "user", "content": question}], "stream": True, "max_tokens": 64, "temperature": 0}
    request = urllib.request.Request(
        url + "/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        for line in response:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise SystemExit(event["error"]["message"])
            for choice in event["choices"]:
                yield choice["delta"].get("content") or ""


def main() -> None:
    """Ask one question and print the answer while it is made."""
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    url, question = sys.argv[1:]
    for piece in stream(url.rstrip("/"), question):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
