"""The faults of a stack with a GPU worker: worker killed, scheduler killed, preemption with swap, both. Texts equal to the CPU's.

    python -m benchmarks.gpu_faults [--json OUT] [--tokens 400] [--copies 8]

The packaged SmolLM2 in fp32. First the CPU worker says what the texts are; then, for the triton backend with and without
CUDA graphs and for the torch backend, each fault strikes while streams flow, and every text is compared with the undisturbed
ones; those without sampling with the CPU's as well. Each question is asked greedily and, with other seeds, `--copies` times
sampled, all at once, so that a fast card has enough to do when a fault strikes. `--device cpu` plays it through without a
card. Exit code 1 if a text differs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.ending import end_in_order
from benchmarks.gpu_results import add_rows
from tests.e2e.stack import Stack, eventually, stack
from tests.e2e.test_real_model import QUESTIONS, ask, chat

FP32 = ("--dtype", "float32", "--max-model-len", "512")
VARIANTS: dict[str, tuple[str, ...]] = {
    "triton": ("--device", "cuda", "--attention", "triton"),
    "triton_eager": ("--device", "cuda", "--attention", "triton", "--enforce-eager"),
    "torch": ("--device", "cuda", "--attention", "torch"),
}
ON_CPU = {"cpu": ("--device", "cpu")}
NOTE = "SmolLM2 in fp32 through the whole stack: whether all texts equal the undisturbed ones, and the greedy ones the CPU's"

Texts = list[tuple[str, list[str]]]


def bodies(tokens: int, copies: int) -> list[dict[str, Any]]:
    """Greedy questions, then the same sampled, each with a seed of its own."""
    greedy = [chat(question, tokens, ignore_eos=True) for question in QUESTIONS]
    return greedy + [body | {"temperature": 0.8, "seed": i} for i, body in enumerate(greedy * copies)]


def compared(name: str, got: Texts, want: Texts) -> bool:
    """Print how the texts compare, and return whether they are equal."""
    differing = [i for i, (a, b) in enumerate(zip(got, want, strict=True)) if a != b]
    print(f"  {name:28s} {'equal' if not differing else f'texts {differing} differ'}", flush=True)
    for i in differing:
        (a, _), (b, _) = got[i], want[i]
        at = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        print(f"    text {i} from character {at}: {a[at : at + 40]!r}, not {b[at : at + 40]!r}")
    return not differing


def killed(made: Stack, asked: list[dict[str, Any]], role: str) -> Texts:
    """The texts if a service dies while they flow; it has been replaced at the end."""
    pid = made.service(role).pid
    texts = ask(made, asked, lambda: made.kill(role))
    eventually(lambda: made.service(role).pid != pid)
    return texts


def swapped(options: tuple[str, ...], tokens: int, kill: bool = False) -> Callable[[list[dict[str, Any]]], Texts]:
    """The texts of a stack whose blocks do not suffice, so that sequences go to host memory and back.

    `kill`: while some are there the scheduler dies, and its successor finds them by their names.
    """
    each = -(-(tokens + 60) // 16)  # blocks of one sequence; more than one fits, not half of them
    scarce = ("--num-gpu-blocks", str(max(2 * each, 33)), "--num-cpu-blocks", str(8 * each), "--preemption", "swap")

    def run(asked: list[dict[str, Any]]) -> Texts:
        with stack() as made:
            made.up(*options, *FP32, *scarce)
            ask(made, [chat(question, 2) for question in QUESTIONS * 3])  # teaches the scheduler to expect short answers

            def figure(name: str) -> float:
                return made.metrics().get(f'pagewire_scheduler_{name}{{name="scheduler-0"}}', 0.0)

            def when_some_are_out() -> None:
                eventually(lambda: figure("host_blocks_used"), 60)
                made.kill("scheduler")

            texts = ask(made, asked, when_some_are_out) if kill else ask(made, asked)
            for name in ("host_hits",) if kill else ("swaps_out", "swaps_in"):
                print(f"    {name}: {eventually(lambda name=name: figure(name)):.0f}")
        return texts

    return run


def main() -> None:
    end_in_order()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--copies", type=int, default=8)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", choices=list(VARIANTS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    asked, greedy = bodies(args.tokens, args.copies), len(QUESTIONS)
    with stack() as made:
        made.up("--device", "cpu", *FP32)
        reference = ask(made, asked[:greedy])
    rows: dict[str, bool] = {}
    for variant, options in (ON_CPU if args.device == "cpu" else VARIANTS).items():
        if args.only not in (None, variant):
            continue
        print(variant, flush=True)

        def note(fault: str, got: Texts, want: Texts) -> None:
            rows[f"faults_{variant}_{fault}"] = compared(fault, got, want)  # noqa: B023

        with stack() as made:
            made.up(*options, *FP32)
            undisturbed = ask(made, asked)
            note("as_on_the_cpu", undisturbed[:greedy], reference)
            for role in ("worker", "scheduler"):
                note(f"{role}_killed", killed(made, asked, role), undisturbed)
        note("swap", swapped(options, args.tokens)(asked), undisturbed)
        note("swap_scheduler_killed", swapped(options, args.tokens, kill=True)(asked), undisturbed)
    if args.json:
        add_rows(args.json, "smollm2-135m", rows, "gpu_faults", NOTE)
    if not all(rows.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
