"""Run as a program: load a model on the CPU, run steps as large as they get, print what the process grew by.

    python -m tests.pagewire.worker_memory DTYPE SEQUENCES BLOCKS [FOLDER TOKENS]

By default the packaged model, and prompts that are one step together; else random weights of a folder's config.json, and prompts of so
many tokens.

Anonymous memory only: the pages of the model's file are the system's, which drops them when it wants to.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import torch

from gpu_worker.loading.transformers_config import read_config
from protocol.memory import give_back_freed
from tests.gpu_worker.model_driver import generate, greedy, load, load_packaged


def anonymous() -> int:
    """Bytes of resident anonymous memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Peak(threading.Thread):
    """Watches memory until `stop`; `most` is the most that was seen."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(0.002):
            self.most = max(self.most, anonymous())

    def stop(self) -> None:
        self._stopped.set()
        self.join()


def main(dtype: str, sequences: int, blocks: int, folder: str = "", tokens: int = 0) -> None:
    torch.bmm(torch.ones(2, 64, 64), torch.ones(2, 64, 64))  # libraries allocate for themselves when first used
    if folder:
        read_config(json.loads((Path(folder) / "config.json").read_text()))  # transformers among them
        give_back_freed()
    before = anonymous()
    settings = {"max_num_seqs": sequences, "num_gpu_blocks": blocks}
    loaded = load(model=folder, load_format="dummy", dtype=dtype, **settings) if folder else load_packaged(dtype, **settings)
    peak = Peak()
    peak.start()
    step = loaded.description.geometry.max_step_tokens
    prompt = [token % 1000 for token in range(tokens or step // sequences)]
    generate(loaded, [prompt] * sequences, [greedy(2)] * sequences, [0] * sequences, chunk=step)
    peak.stop()
    print(peak.most - before)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:5], *map(int, sys.argv[5:]))
