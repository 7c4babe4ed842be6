"""Send prompts to the small server, all at once, so that it can batch them.

python examples/simple_vllm/client.py "The capital of France is" "One, two, three,"
"""

from __future__ import annotations

import argparse
import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def generate(url: str, prompt: str, max_tokens: int) -> dict[str, Any]:
    """The server's answer: request_id, text, tokens_generated. Raises urllib.error.HTTPError for a refusal."""
    body = json.dumps({"prompt": prompt, "max_tokens": max_tokens}).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{url}/generate", body, {"Content-Type": "application/json"})) as answer:
        return json.load(answer)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--max-tokens", type=int, default=30)
    arguments = parser.parse_args()
    with ThreadPoolExecutor(len(arguments.prompts)) as pool:
        answers = pool.map(lambda prompt: generate(arguments.url, prompt, arguments.max_tokens), arguments.prompts)
        for prompt, answer in zip(arguments.prompts, answers, strict=True):
            print(f"{answer['request_id']}: {prompt}{answer['text']}")
