"""What fits beside the weights: blocks, the largest batch at a context, the largest context of a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from pagewire.plan.memory import Memory, Setup, estimate_memory, fp8_matrices, length_limit
from pagewire.plan.sizes import ModelSizes, PlanError, Sizes, read_sizes

MOST_SEQUENCES = 1024  # slots of one worker
CPU_SEQUENCES = 16  # more than this gain little on a CPU


@dataclass(frozen=True)
class Room:
    """A worker's blocks under a memory limit, and settings that suit it. `blocks` is 0 if the model does not fit."""

    memory: Memory
    limit: int  # bytes that the worker may use
    blocks: int
    context: int  # max_model_len
    settings: dict[str, int | float | str]  # recommended, by the worker's names
    notes: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Tokens that the cache holds."""
        return self.blocks * (self.memory.kv_per_block // self.memory.kv_per_token)


def blocks_under(memory: Memory, setup: Setup, total: int) -> int:
    """Blocks that a worker finds room for on a device of `total` bytes; 0 if there is none."""
    left = int(total * setup.gpu_memory_utilization) - memory.overhead - memory.weights - memory.activations
    return max(0, left // memory.kv_per_block - 1)


def longest_served(model: str | Path | Sizes) -> int:
    """The longest sequence, in tokens, that a worker computes rightly: all that the model was made for, or less; 0: none."""
    sizes, _ = _given(model, None)

    def served(length: int) -> bool:
        try:
            length_limit(sizes, Setup(max_model_len=length))
        except PlanError:
            return False
        return True

    return _largest(served, sizes.config.max_length)


def largest_batch(model: str | Path | Sizes, context: int, total: int, setup: Setup | None = None) -> int:
    """How many sequences of `context` tokens fit at once on a device of `total` bytes; at most 1,024. 0: not even one.

    Raises PlanError for a context that is no length the model can have.
    """
    sizes, setup = _given(model, setup)
    longest = longest_served(sizes)
    if not 1 <= context <= longest:
        raise PlanError(f"context: {context} is not between 1 and the {longest} tokens that a worker serves of this model")
    needed = -(-context // setup.block_size)

    def fits(batch: int) -> bool:
        made = replace(setup, max_num_seqs=batch, max_model_len=context)  # the buffers depend on both
        return blocks_under(estimate_memory(sizes, made), made, total) >= batch * needed

    return _largest(fits, MOST_SEQUENCES)


def largest_context(model: str | Path | Sizes, batch: int, total: int, setup: Setup | None = None) -> int:
    """The longest that `batch` sequences can all be at once on a device of `total` bytes, at most `longest_served`."""
    sizes, setup = _given(model, setup)
    if batch < 1:
        raise PlanError(f"batch: {batch} is less than 1")

    def fits(context: int) -> bool:
        made = replace(setup, max_num_seqs=batch, max_model_len=context)
        return blocks_under(estimate_memory(sizes, made), made, total) >= batch * -(-context // setup.block_size)

    return _largest(fits, longest_served(sizes))


def room(model: str | Path | Sizes, total: int, setup: Setup | None = None) -> Room:
    """What a worker with this setup finds on a device of `total` bytes, and the settings that would suit it."""
    sizes, setup = _given(model, setup)
    memory = estimate_memory(sizes, setup)
    blocks = blocks_under(memory, setup, total)
    context = length_limit(sizes, setup)
    suited, notes = _recommend(sizes, setup, total, context)
    needed = -(-context // setup.block_size)
    if blocks < needed:
        notes.insert(0, f"a worker with these settings does not start: {needed} blocks hold one sequence of {context} tokens, {blocks} fit")
    fp8 = setup.quantization == "fp8" or (isinstance(sizes, ModelSizes) and sizes.config.quantization is not None)
    if fp8 and setup.device == "cuda" and not fp8_matrices(sizes, setup):
        notes.append("no weights are kept in fp8: a card multiplies it with bfloat16, and rows and columns in sixteens")
    return Room(memory, int(total * setup.gpu_memory_utilization), blocks, context, suited, tuple(notes))


def _recommend(sizes: Sizes, setup: Setup, total: int, context: int) -> tuple[dict[str, int | float | str], list[str]]:
    """Settings for conversations that fill half their context on average, and what is to be said about them."""
    longest = largest_context(sizes, 1, total, setup)
    if not longest:
        return {}, ["the model does not fit: take a larger device, a smaller dtype, or fewer max_num_batched_tokens"]
    notes = []
    if longest < context:
        notes.append(f"a single sequence can have {longest} tokens at most; max_model_len is lowered to that")
        context = longest
    at_half = largest_batch(sizes, max(1, context // 2), total, setup)
    most = CPU_SEQUENCES if setup.device == "cpu" else MOST_SEQUENCES
    sequences = max(1, min(most, at_half))
    sequences = 1 << sequences.bit_length() - 1  # the power of two below: graphs are captured for round numbers
    made = replace(setup, max_num_seqs=sequences, max_model_len=context)
    suited: dict[str, int | float | str] = {
        "max_model_len": context,
        "max_num_seqs": sequences,
        "max_num_batched_tokens": setup.step_tokens,
        "block_size": setup.block_size,
    }
    suited |= {name: getattr(setup, name) for name in ("quantization", "kv_cache_dtype") if getattr(setup, name) != "auto"}
    if setup.device == "cuda":
        suited["gpu_memory_utilization"] = setup.gpu_memory_utilization
    else:
        suited["num_gpu_blocks"] = min(blocks_under(estimate_memory(sizes, made), made, total), sequences * -(-context // setup.block_size))
    if sequences < 8:
        notes.append(f"only {sequences} sequences of {context // 2} tokens run at once: the device is read once for few tokens")
    return suited, notes


def _given(model: str | Path | Sizes, setup: Setup | None) -> tuple[Sizes, Setup]:
    return read_sizes(model) if isinstance(model, str | Path) else model, setup or Setup()


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits; 0 if 1 does not. What fits, fits when it is smaller."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
