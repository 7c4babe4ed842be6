"""Kernels are begun before torch is there, and an engine takes those and begins no others. No card is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu_shapes import SHAPES
from gpu_worker.cuda import driver, kernels_of, runner, triton_kernel
from gpu_worker.cuda.attention_kernels import AttentionKernels
from gpu_worker.cuda.build import Build, build_of
from gpu_worker.cuda.card import Card
from gpu_worker.cuda.compiler import compile_cubin, compilers
from gpu_worker.cuda.kernels_of import Kernels, begin_kernels
from gpu_worker.cuda.memory import Options
from gpu_worker.errors import LoadError
from gpu_worker.loading.config import from_json
from gpu_worker.settings import WorkerSettings

HOPPER = Card(9, 0, 132)


class NoCompilers:
    """Notes what it is to compile."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []

    def submit(self, work: Callable[..., Any], *args: object) -> Future[Any]:
        self.asked.append((work.__name__, *map(repr, args)))
        return Future()

    begin = submit


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What compilers are asked for, which are not there; the card is an H100."""
    played = NoCompilers()
    for module in (driver, triton_kernel, kernels_of):
        monkeypatch.setattr(module, "compilers", lambda: played)
    monkeypatch.setattr(kernels_of, "first_card", lambda: HOPPER)
    return played.asked


def settings_for(folder: Path, shape: str, **settings: Any) -> WorkerSettings:
    (folder / "config.json").write_text(json.dumps(SHAPES[shape]))
    return WorkerSettings(folder / "run", model=str(folder), load_format="dummy", device="cuda", **settings)


class Reached(Exception):
    """An engine has its kernels."""


@pytest.mark.parametrize("shape", ["qwen3-0.6b", "llama-3.1-8b"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_cache_dtype": "fp8"},
        {"quantization": "fp8"},
        {"dtype": "float16", "max_model_len": 1000, "block_size": 32},
        {"filter_kernel": False, "pack_prefixes": False, "max_num_seqs": 8},
    ],
    ids=str,
)
def test_an_engine_compiles_what_was_begun_before_it(
    shape: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[tuple[str, ...]]
) -> None:
    pytest.importorskip("safetensors")
    from gpu_worker.cuda import loading

    settings = settings_for(tmp_path, shape, **options)
    kernels = begin_kernels(settings)
    assert kernels is not None
    begun = list(asked)
    assert len(begun) == len(set(begun)), "something is compiled twice"

    def stream(*_: object) -> None:
        raise Reached

    tensor = torch.tensor
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    played = {"is_available": lambda: True, "current_device": lambda: 0, "get_device_properties": lambda _: properties, "Stream": stream}
    for name, by in played.items():
        monkeypatch.setattr(torch.cuda, name, by)
    monkeypatch.setattr(torch, "tensor", lambda values, device: tensor(values))
    with pytest.raises(Reached):
        loading.load_engine(settings, kernels)
    assert asked == begun
    with pytest.raises(Reached):
        loading.load_engine(replace(settings, block_size=64), kernels)
    assert len(asked) > len(begun), "those were for another cache"


@pytest.mark.parametrize(
    "config",
    [
        "",
        "{",
        "[]",
        "{}",
        json.dumps({"architectures": ["MambaForCausalLM"], "vocab_size": 300}),
        json.dumps(SHAPES["tiny"] | {"head_dim": 40}),
        json.dumps(SHAPES["tiny"] | {"num_attention_heads": 0}),
        json.dumps(SHAPES["tiny"] | {"hidden_size": "large"}),
    ],
)
def test_what_cannot_be_begun_is_left_to_loading(config: str, tmp_path: Path, asked: list[tuple[str, ...]]) -> None:
    settings = settings_for(tmp_path, "tiny")
    assert begin_kernels(settings) is not None
    assert begin_kernels(replace(settings, load_format="gguf")) is None
    assert begin_kernels(replace(settings, max_num_seqs=2000)) is None
    (tmp_path / "config.json").write_text(config)
    assert begin_kernels(settings) is None
    (tmp_path / "config.json").unlink()
    assert begin_kernels(settings) is None


def test_other_cards_take_no_kernels_for_hopper(asked: list[tuple[str, ...]]) -> None:
    settings, config = WorkerSettings(Path("run")), from_json(SHAPES["qwen3-0.6b"])
    kernels = Kernels(build_of(settings, config, Card(8, 9, 128)))
    assert not kernels.attention.decode_few
    assert kernels.attention.prefill_hopper is None
    assert not any(linear.kernels for linear in kernels.step.linears.values())
    with pytest.raises(LoadError, match=r"capability is 7\.5"):
        build_of(settings, config, Card(7, 5, 40))
    with pytest.raises(LoadError, match=r"fp8 needs compute capability 8\.9; the card's is 8\.0"):
        build_of(replace(settings, kv_cache_dtype="fp8"), config, Card(8, 0, 108))


def test_pages_that_tiles_do_not_divide_take_the_other_prefill_kernel(asked: list[tuple[str, ...]]) -> None:
    config = from_json(SHAPES["tiny"] | {"head_dim": 64})
    builds = {page: Build(config, "bfloat16", False, Options(block_size=page), HOPPER) for page in (8, 16, 24, 48, 64, 80, 96, 192, 256)}
    found = {page for page, build in builds.items() if AttentionKernels(build).prefill_hopper is not None}
    assert found == {8, 16, 64, 192, 256}


def test_a_load_that_fails_leaves_no_compilation_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = compilers()
    monkeypatch.setattr(runner, "has_card", lambda: True)
    monkeypatch.setattr(runner.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(runner, "begin_kernels", lambda settings: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LoadError):
        runner.CudaRunner(WorkerSettings(tmp_path, device="cuda")).load()
    with pytest.raises(RuntimeError, match="shutdown"):
        before.submit(int)
    compilers().submit(int)


BEGIN = """
import sys
sys.modules["torch"] = None  # to import it fails
from pathlib import Path
from gpu_worker.cuda import kernels_of
from gpu_worker.cuda.card import Card
from gpu_worker.cuda.compiler import compilers
from gpu_worker.cuda.driver import Kernel
from gpu_worker.settings import WorkerSettings
from tests.gpu_worker.cuda.cubin import check_signature

kernels_of.first_card = lambda: Card(9, 0, 132)
kinds = {"quantization": sys.argv[2], "kv_cache_dtype": sys.argv[2]}
kernels = kernels_of.begin_kernels(WorkerSettings(Path("run"), model=sys.argv[1], load_format="dummy", **kinds))
compilers().wait()
step, attention = kernels.step, kernels.attention
of_triton = [attention.decode_many, *attention.prefill_plain]
if attention.prefill_hopper is not None:
    attention.prefill_hopper.wait()
    assert attention.prefill_hopper._kernel.block == 384
    of_triton.append(attention.prefill_hopper)
made = [kernel for kernel in vars(step).values() if isinstance(kernel, Kernel)]
made += [kernel for linear in (*step.linears.values(), *step.fp8_linears.values()) for _, kernel, _ in linear.kernels]
made += [*attention.decode_few.values(), *(kernel._kernel for kernel in of_triton)]
for kernel in made:
    check_signature(kernel)
assert {kernel.name for kernel in made} >= {"linear", "prepare", "rotate_and_store", "decode_attention", "prefill_attention"}
print(kernels.attention.decode_many._kernel.name, kernels.step.prepare.module._cubin()[1:4].decode())
"""


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["auto", "fp8"])
def test_everything_compiles_without_torch(cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("PAGEWIRE_CACHE", str(tmp_path))
    try:
        compile_cubin("plan.cu", "sm_90a", {})
    except LoadError:
        pytest.skip("needs nvidia-cuda-nvrtc")
    settings = settings_for(tmp_path, "llama-3.1-8b")
    path = os.pathsep.join([str(Path(__file__).parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environ = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environ |= {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    command = [sys.executable, "-c", BEGIN, settings.model, cache]
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)
    assert ended.stdout == "decode_attention ELF\n", ended.stderr
