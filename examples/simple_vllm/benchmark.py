"""What batching is worth: tokens per second of the small engine at several batch sizes.

python examples/simple_vllm/benchmark.py --requests 8 --max-tokens 32
"""

from __future__ import annotations

import argparse
import time

from simple_engine import SimpleLLMEngine, load


def measure(model: object, batch_size: int, prompts: list[list[int]], max_tokens: int) -> tuple[float, float]:
    """Generated tokens per second, and the mean seconds from a request's arrival to its end."""
    engine = SimpleLLMEngine(model, batch_size)
    start = time.perf_counter()
    tokens = sum(len(ids) for ids in engine.generate(prompts, max_tokens))
    return tokens / (time.perf_counter() - start), engine.scheduler.statistics.average_duration


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="folder, .gguf file or hub id; none: the packaged SmolLM2")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    arguments = parser.parse_args()
    loaded, _ = load(arguments.model)
    requests = [[(7 * i + j) % 1000 + 10 for j in range(arguments.prompt_tokens)] for i in range(arguments.requests)]
    measure(loaded, 1, requests[:1], 4)  # warm-up
    print(f"{'batch':>5} {'tokens/s':>10} {'mean latency, s':>16}")
    for size in arguments.batch_sizes:
        speed, latency = measure(loaded, size, requests, arguments.max_tokens)
        print(f"{size:5} {speed:10.1f} {latency:16.2f}")
