"""Prompts in, texts out, without a server: `python examples/offline.py [MODEL]`."""

from __future__ import annotations

import sys

from pagewire import LLM, SamplingParams

PROMPTS = ["The capital of France is", "Water boils at", "A short poem about the sea:"]


def main() -> None:
    """Start a scheduler and a worker, ask them, and end them."""
    with LLM(*sys.argv[1:2], max_num_seqs=16) as llm:
        for output in llm.generate(PROMPTS, SamplingParams(max_tokens=24, temperature=0.7, seed=1)):
            print(f"{output.prompt!r} -> {output.outputs[0].text!r}")
        [answer] = llm.chat([{"role": "user", "content": "Name three colours."}], SamplingParams(max_tokens=32, temperature=0))
        print(f"chat -> {answer.outputs[0].text!r}")


if __name__ == "__main__":
    main()
