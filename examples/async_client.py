"""Several streams at once under asyncio, without a server: `python examples/async_client.py [RUN_DIR]`.

With a run directory it joins the services there (`pagewire up --run-dir RUN_DIR`), else it starts its own.
"""

from __future__ import annotations

import asyncio
import sys

from pagewire import AsyncLLMEngine, SamplingParams

PROMPTS = ["One, two, three,", "The sea is", "Roses are red,"]


async def follow(engine: AsyncLLMEngine, prompt: str) -> None:
    """Print the whole text once it is there, and in how many steps it came."""
    steps, text = 0, ""
    async for output in engine.generate(prompt, SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)):
        steps += 1
        text = output.outputs[0].text
    print(f"{prompt!r} -> {text!r} in {steps} steps")


async def main() -> None:
    """All prompts at once."""
    async with AsyncLLMEngine(run_dir=sys.argv[1] if len(sys.argv) > 1 else None) as engine:
        await asyncio.gather(*(follow(engine, prompt) for prompt in PROMPTS))


if __name__ == "__main__":
    asyncio.run(main())
