"""Gluon on the host, as far as a kernel that computes with TMA, barriers and warpgroup products needs it: torch tensors, a thread
for each group of warps.

What is asynchronous on a card is late here: a copy arrives at once or only when somebody waits for it, and a product reads its
operands when it is waited for. A buffer that is given back too early, or read too early, gives wrong results; a barrier that is
never reached, an error. Layouts are not looked at.
"""

from __future__ import annotations

import importlib.util
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

PATIENCE = 10.0  # seconds at a barrier
_group = threading.local()  # the products in flight of this group of warps
_program = SimpleNamespace(ids=(0, 0), grid=(1, 1))


class Block(torch.Tensor):
    """A tensor in registers."""

    @property
    def type(self) -> Any:  # type: ignore[override]
        return SimpleNamespace(layout=_layout())


class Pointer:
    """An address in a tensor, or a tensor of them."""

    def __init__(self, memory: torch.Tensor, at: Any = 0) -> None:
        self.memory, self.at = memory, at
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.at + offset)


class Tile:
    """A view of shared memory: [rows, columns / 64, 64], the middle dimension outermost in memory."""

    def __init__(self, view: torch.Tensor) -> None:
        self.view, self.flipped = view, False

    def load(self, _: object = None) -> torch.Tensor:
        rows = self.view.reshape(len(self.view), -1)
        return (rows.t() if self.flipped else rows).as_subclass(Block)

    def store(self, value: torch.Tensor) -> None:
        self.view.copy_(value.view(self.view.shape))

    def permute(self, _: object) -> Tile:
        turned = Tile(self.view)
        turned.flipped = not self.flipped
        return turned


class Ring:
    """Shared memory of boxes [n, rows, 64], or of tiles [n, rows, columns] in the same place."""

    def __init__(self, memory: torch.Tensor, shape: tuple[int, ...]) -> None:
        self.memory, self.shape, self.dtype = memory, shape, memory.dtype

    def index(self, i: int) -> Tile:
        n, rows, columns = self.shape
        return Tile(self.memory.view(n, columns // 64, rows, 64)[i].transpose(0, 1))

    def reinterpret(self, _: object, shape: list[int], layout: object) -> Ring:
        return Ring(self.memory, tuple(shape))


class Barrier:
    """An mbarrier: a phase ends when `count` have arrived and all bytes that were announced are there."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.phase = self.missing = self.bytes = 0
        self.late: list[Callable[[], None]] = []

    def init(self, count: int) -> None:
        self.count = self.missing = count

    def take(self, arrivals: int, amount: int) -> None:
        with self.changed:
            self.missing -= arrivals
            self.bytes += amount
            assert self.missing >= 0, "one too many arrived"
            if not self.missing and not self.bytes:
                self.phase, self.missing = self.phase + 1, self.count
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        def over() -> bool:
            while self.late:
                self.late.pop()()
            return self.phase % 2 != parity

        with self.changed:
            if not self.changed.wait_for(over, PATIENCE):
                raise TimeoutError("nobody reached the barrier")


class Product:
    """A product in flight."""

    def __init__(self, a: torch.Tensor, b: Tile, acc: torch.Tensor, use_acc: bool) -> None:
        self.operands, self.value = (a, b, acc, use_acc), None
        _group.flying = [*getattr(_group, "flying", []), self]

    def finish(self) -> None:
        a, b, acc, use_acc = self.operands
        product = a.float() @ b.load().float()
        self.value = acc + product if use_acc else product


def _wait_for_products(left: int, deps: list[Any]) -> Any:
    flying = getattr(_group, "flying", [])
    for product in flying[: len(flying) - left]:
        product.finish()
    _group.flying = flying[len(flying) - left :]
    values = tuple(d.value if isinstance(d, Product) and d.value is not None else d for d in deps)
    return values[0] if len(values) == 1 else values


def _copy(source: Descriptor, at: list[int], barrier: Barrier, to: Tile) -> None:
    def arrive() -> None:
        to.store(source.matrix[at[0] : at[0] + source.box[0], at[1] : at[1] + source.box[1]])
        barrier.take(0, -2 * source.box[0] * source.box[1])

    with barrier.changed:  # re-entered by `arrive`
        barrier.late.append(arrive)
        if random.random() < 0.5:
            barrier.late.pop()()
        barrier.changed.notify_all()


class Descriptor:
    """A matrix [rows, columns] and what is copied of it at a time."""

    def __init__(self, matrix: torch.Tensor, box: tuple[int, int]) -> None:
        self.matrix, self.box = matrix, box


def _allocate(dtype: torch.dtype, shape: list[int], layout: Any) -> Any:
    if layout == "barriers":
        barriers = [Barrier() for _ in range(shape[0])]
        return SimpleNamespace(index=barriers.__getitem__)
    return Ring(torch.full(shape, torch.nan, dtype=dtype), tuple(shape))


def _load(pointer: Pointer, mask: Any = None, other: float = 0.0) -> Any:
    if not isinstance(pointer.at, torch.Tensor):
        return pointer.memory.view(-1)[pointer.at].item()
    at = pointer.at if mask is None else torch.where(mask, pointer.at, 0)
    assert at.min() >= 0, "read before the beginning"
    found = pointer.memory.view(-1)[at]
    return (found if mask is None else torch.where(mask, found, other)).as_subclass(Block)


def _store(pointer: Pointer, value: torch.Tensor, mask: torch.Tensor) -> None:
    mask = mask.expand(value.shape)
    assert not mask.any() or pointer.at[mask].min() >= 0, "written before the beginning"
    pointer.memory.view(-1)[pointer.at[mask]] = value[mask]


def _specialise(parts: list[tuple[Callable[..., None], tuple[Any, ...]]], *_: object) -> None:
    failures: list[BaseException] = []

    def run(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        try:
            function(*arguments)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=part) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _layout(*_: object, **__: object) -> Any:
    layout = SimpleNamespace()
    layout.parent = layout.value = layout
    return layout


def _jit(function: Callable[..., None] | None = None, **_: object) -> Any:
    return function or (lambda function: function)


def _either(ours: Callable[..., Any], torchs: Callable[..., Any]) -> Callable[..., Any]:
    """An operation on numbers and on tensors."""
    return lambda a, b: torchs(a, torch.as_tensor(b)) if isinstance(a, torch.Tensor) else ours(a, b)


def _where(there: Any, a: Any, b: Any) -> Any:
    return torch.where(there, a, b) if isinstance(there, torch.Tensor) else a if there else b


def load_kernel(path: Path) -> ModuleType:
    """The module of a kernel, which is written in Gluon, with functions of the host instead."""
    language = SimpleNamespace(
        shared_memory_descriptor=Ring,
        **dict.fromkeys(("NVMMASharedLayout", "NVMMADistributedLayout", "DotOperandLayout", "SliceLayout", "BlockedLayout"), _layout),
        constexpr=lambda value: value, static_range=range, int64=torch.int64, float32=torch.float32,
        program_id=lambda axis: _program.ids[axis], num_programs=lambda axis: _program.grid[axis],
        load=_load, store=_store, allocate_shared_memory=_allocate, warp_specialize=_specialise, thread_barrier=lambda: None,
        arange=lambda a, b, _: torch.arange(a, b).as_subclass(Block),
        full=lambda shape, x, dtype, _: torch.full(shape, x, dtype=dtype).as_subclass(Block),
        minimum=_either(min, torch.minimum), maximum=_either(max, torch.maximum), where=_where, exp2=torch.exp2,
        max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis), convert_layout=lambda x, _: x,
    )  # fmt: skip
    barriers = SimpleNamespace(
        MBarrierLayout=lambda: "barriers",
        init=lambda barrier, count: barrier.init(count),
        expect=lambda barrier, amount: barrier.take(1, amount),
        arrive=lambda barrier, count: barrier.take(count, 0),
        wait=lambda barrier, phase, pred=True: barrier.wait(phase) if pred else None,
    )
    hopper = SimpleNamespace(
        fence_async_shared=lambda: None,
        mbarrier=barriers,
        tma=SimpleNamespace(async_copy_global_to_shared=_copy),
        warpgroup_mma=lambda a, b, acc, use_acc=True, is_async=True: Product(a, b, acc, use_acc),
        warpgroup_mma_wait=_wait_for_products,
    )
    root = "triton.experimental.gluon"
    fakes = {
        "triton": SimpleNamespace(),
        "triton.experimental": SimpleNamespace(gluon=SimpleNamespace(jit=_jit, language=language)),
    }
    fakes |= {root: fakes["triton.experimental"].gluon, root + ".language": language, root + ".language.nvidia.hopper": hopper}
    kept = {name: sys.modules.get(name) for name in fakes}
    spec = importlib.util.spec_from_file_location(f"host_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.update(fakes)  # type: ignore[arg-type]
    try:
        spec.loader.exec_module(module)
    finally:
        for name, was in kept.items():
            if was is None:
                del sys.modules[name]
            else:
                sys.modules[name] = was
    return module


def launch(kernel: Callable[..., None], grid: tuple[int, int], arguments: list[Any], **constants: int) -> None:
    """Run a kernel's programs one after another; tensors among the arguments are given as pointers."""
    _program.grid = grid
    given = [Pointer(a) if isinstance(a, torch.Tensor) else a for a in arguments]
    for x in range(grid[0]):
        for y in range(grid[1]):
            _program.ids = (x, y)
            kernel(*given, **constants)
