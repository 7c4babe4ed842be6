"""The load generator behind `pagewire bench serve`, for a checkout without an installed command.

    python benchmarks/http_load.py --url http://127.0.0.1:8000 --requests 200 --rate 20
    python benchmarks/http_load.py --lengths lengths.json --requests 1000 --processes 6 --ignore-eos --json out.json

Arrivals are a Poisson process (`--rate`), evenly spaced (`--arrivals even`) or all at once (no rate); `--concurrency`
bounds how many are under way. `pagewire/bench/figures.py` defines the figures, `--help` lists everything.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from pagewire.bench.command import serve

    serve(prog_name="http_load.py")
