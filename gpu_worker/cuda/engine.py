"""One model on one card: device state, forward pass, graphs. Steps go in by `start`, tokens come out by `finish`.

`start` only enqueues: it never waits for the card, save when it is a whole ring ahead of it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
import torch

from gpu_worker.cuda.build import Build
from gpu_worker.cuda.card import Card
from gpu_worker.cuda.compiler import compilers
from gpu_worker.cuda.filter import FilterKernel
from gpu_worker.cuda.forward import Forward, Layers
from gpu_worker.cuda.general import Beside, General, report
from gpu_worker.cuda.graphs import Graphs, Shape, bucket_of, likely_shapes, mixed_bucket
from gpu_worker.cuda.kernels_of import Kernels
from gpu_worker.cuda.memory import Options
from gpu_worker.cuda.state import DeviceState, block_copies, is_decode
from gpu_worker.cuda.weights import UnreadWeights
from gpu_worker.layers.rope import rope_table
from gpu_worker.loading.config import ModelConfig
from gpu_worker.logprobs import PromptScores
from gpu_worker.runner import Outcome, Step
from gpu_worker.sampling_memory import KEPT_BACK
from gpu_worker.worst_case import blocks_that_fit, measure, worst_step
from protocol.messages import Geometry

log = logging.getLogger("worker")


@dataclass(slots=True)
class _Running:
    step: int
    result: int  # entry of the result ring
    outputs: int
    event: torch.cuda.Event
    beside: Beside | None  # what `general.py` adds to the result ring
    scores: PromptScores | None


def angles(config: ModelConfig, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the rotary embedding, fp32 [length, head_dim / 2] each."""
    table, half = rope_table(config, length).to(device), config.head_dim // 2
    return table[:, 0, :half].contiguous(), table[:, 1, half:].contiguous()


def card_of(device: torch.device) -> Card:
    """What compilers must know of it."""
    properties = torch.cuda.get_device_properties(device)
    return Card(properties.major, properties.minor, properties.multi_processor_count)


class Engine:
    """The step on the card. `start` is called on one thread, in plan order; `finish` on another, in the same order."""

    def __init__(
        self,
        config: ModelConfig,
        unread: UnreadWeights,
        options: Options,
        kv_scales: torch.Tensor | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        """kv_scales: fp32 [layers, 4], units of keys and values, the rest unused (16 bytes a layer); with them the cache is fp8.
        kernels: that were begun before; if they are for something else, others are.

        The cache is made last, of what is left under `options.utilization` beside the step that takes most, which is run for that.
        Raises LoadError if the card has no room for a single sequence of max_model_len.
        """
        self.config, self.options = config, options
        self.device, dtype = unread.device, unread.dtype
        card = card_of(self.device)
        build = Build(config, str(dtype).removeprefix("torch."), kv_scales is not None, options, card)
        if kernels is None or kernels.build != build:
            kernels = Kernels(build)
        self.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        spread = max(4, card.sms * 2 // config.kv_heads)  # items that fill the card, measured
        geometry = Geometry(
            block_size=options.block_size,
            blocks=1,
            host_blocks=options.host_blocks,
            slots=options.max_num_seqs,
            max_model_len=options.max_model_len,
            max_step_tokens=options.max_num_batched_tokens,
            vocab_size=config.vocab_size,
        )
        self.state = DeviceState(geometry, self.device, spread, build.tile_tokens, pack=build.pack)
        block = (2, config.kv_heads, options.block_size, config.head_dim)
        cached = dtype if kv_scales is None else torch.uint8
        # mapped: kernels copy to and from it
        self._host_cache = torch.zeros((config.layers, options.host_blocks, *block), dtype=cached, pin_memory=options.host_blocks > 0)
        filter_kernel = FilterKernel(kernels.step.filter) if kernels.step.filter is not None else None
        self.forward = Forward(
            kernels,
            unread,
            self.state,
            torch.zeros((config.layers, geometry.blocks + 1, *block), dtype=cached, device=self.device),
            angles(config, options.max_model_len, self.device),
            kv_scales,
        )
        self.graphs = Graphs(self._body, self.forward.layers, options.graphs, self.forward.one_of_each)
        self._likely = likely_shapes(geometry) if options.capture_idle else []
        self.general = General(self.state, self.forward, filter_kernel)
        self._pending: deque[_Running] = deque()
        # Pinned memory given back while the other thread captures would have its event captured; what is dropped here is long over.
        self._kept: deque[_Running] = deque(maxlen=self.state.results)
        self._free: SimpleQueue[int] = SimpleQueue()  # entries of the result ring, the one used longest ago first
        for result in range(self.state.results):
            self._free.put(result)
        # One for each entry: made once, recorded again when the entry is used again, which is when its step has been finished.
        self._events = [torch.cuda.Event(blocking=True) for _ in range(self.state.results)]  # type: ignore[no-untyped-call]
        self._last_end = 0
        self._hold(self._blocks_that_fit())
        torch.cuda.synchronize(self.device)

    @property
    def geometry(self) -> Geometry:
        """The sizes it serves."""
        return self.state.geometry

    def _blocks_that_fit(self) -> int:
        """Blocks that there is room for beside the step that takes most; to be asked before there is any other."""
        torch.cuda.synchronize(self.device)
        log.debug("start: weights read")
        usage = measure(self._run_worst_step)
        log.debug("start: largest step run")  # which waits for the kernels that it launches
        compilers().wait()
        log.debug("start: all kernels compiled")
        o, block, needed = self.options, self.forward.cache[:, 0].nbytes, self.geometry.table_width
        return blocks_that_fit(usage, o.utilization, block, needed, o.num_blocks, KEPT_BACK)

    def _run_worst_step(self) -> None:
        self.start(worst_step(self.geometry))
        self.finish()
        self._kept.clear()
        self._last_end = 0

    def _hold(self, blocks: int) -> None:
        """Serve from an empty cache of so many blocks. Nothing may be in flight, and no graph captured."""
        layers, _, *block = self.forward.cache.shape
        self.forward.cache = torch.zeros((layers, blocks + 1, *block), dtype=self.forward.cache.dtype, device=self.device)
        self.state.hold(blocks)

    def start(self, step: Step) -> None:
        """Enqueue a step."""
        result = self._free.get()
        try:
            running = self._enqueue(step, result)
            self._kept.append(running)
            self._pending.append(running)
        except Exception:
            self._free.put(result)
            raise

    def _enqueue(self, step: Step, result: int) -> _Running:
        outputs, beside, scores = int(np.count_nonzero(step.outputs)) + len(step.fork_slots), None, None
        stream = self.stream.cuda_stream
        self._take_stream()
        self.general.bind(step)
        general = self.general.needed(step.output_slots)
        entries = self.state.write(step, result)
        number = next(entries)
        for following in entries:  # `number` holds assignments only
            self.forward.prepare(stream, 0, decode=False)
            self.state.guards[number] = self._event()
            number = following
        if len(step.slots):
            self._compute(step, outputs, sampling=bool(outputs) and not general)
        else:
            self.forward.prepare(stream, 0, decode=False)
            self._copy(step)
        if len(step.scores):
            scores = report(step, self.forward)
        if outputs and general:
            beside = self.general.sample(step, stream)
        if general or not outputs:
            self.forward.mark(stream)
        event = self._events[result]
        event.record(self.stream)
        self.state.guards[number] = event
        return _Running(step.plan.step, result, outputs, event, beside, scores)

    def finish(self) -> Outcome:
        """Wait for the oldest step and return what it sampled."""
        running = self._pending.popleft()
        running.event.synchronize()
        tokens, flags, start, end = self.state.read(running.result, running.outputs)
        outcome = Outcome(tokens=tokens, flags=flags)
        if running.beside is not None:
            running.beside.add_to(outcome)
        if running.scores is not None:
            outcome.scores = running.scores.read()
        outcome.copied = running.step  # copies are part of the step
        outcome.seconds = (end - start) * 1e-9
        outcome.idle = max(0, start - self._last_end) * 1e-9 if self._last_end else 0.0
        self._last_end = end
        self._free.put(running.result)
        return outcome

    def idle(self, interrupted: Callable[[], bool]) -> bool:
        """Capture a graph of a size that is likely to be met, unless `interrupted()` becomes true; returns whether any is left.

        Nothing may be in flight.
        """
        settled = self.forward.attention.settled()
        shape = self.graphs.missing([shape for shape in self._likely if settled or not shape.tokens])
        if shape is None:
            return not settled
        self._take_stream()
        if not self.graphs.met(shape):
            (number,) = self.state.write(Step.nothing(), 0)
            self.graphs.warm_up(shape)
            self.state.guards[number] = self._event()
        self.graphs.capture(shape, interrupted)
        return True

    def reset(self) -> None:
        """Forget all slots. Nothing may be in flight."""
        self._take_stream()
        self.state.reset()

    def _take_stream(self) -> None:
        """Let torch's calls of this thread go to the engine's stream from now on; a context around every step costs twice as much."""
        if torch.cuda.current_stream(self.device).cuda_stream != self.stream.cuda_stream:
            torch.cuda.set_stream(self.stream)

    def _compute(self, step: Step, outputs: int, sampling: bool) -> None:
        """Rows to logits, and on to tokens if `sampling`: as a graph where the step has a captured size."""
        rows = len(step.slots)
        if is_decode(step):
            self.graphs.run(Shape(bucket_of(rows, self.geometry.slots), 0, sampling))
            return
        tokens = int(step.counts.sum())
        copies = any(source for source, _ in block_copies(step.plan))
        bucket = mixed_bucket(max(rows, outputs), tokens, self.geometry)
        if bucket and not copies and self.forward.attention.settled():
            self.graphs.run(Shape(*bucket, sampling))
            return
        stream, forward = self.stream.cuda_stream, self.forward
        tiles = int((-(-step.counts // self.state.tile_tokens)).sum())
        forward.prepare(stream, max(rows, outputs), False, tokens, tiles)
        self._copy(step)
        forward.prefill(stream, rows, tokens, tiles, int((step.outputs > 0).sum()))
        if sampling:
            forward.sample(stream, outputs)

    def _body(self, shape: Shape, layers: Layers | None) -> None:
        """What a graph of this size holds."""
        stream, forward = self.stream.cuda_stream, self.forward
        if shape.tokens:
            tiles = min(-(-shape.tokens // self.state.tile_tokens) + shape.rows, self.state.max_tiles)
            forward.prepare(stream, shape.rows, False, shape.tokens, tiles)
            forward.prefill(stream, shape.rows, shape.tokens, tiles, shape.rows, layers)
        else:
            forward.prepare(stream, shape.rows, decode=True)
            forward.decode(stream, shape.rows, layers)
        if shape.sampling:
            forward.sample(stream, shape.rows)

    def _copy(self, step: Step) -> None:
        """The plan's block copies, behind `prepare`."""
        first = 0
        card, host = self.forward.cache, self._host_cache
        for (source, _), places in zip(block_copies(step.plan), ((card, card), (card, host), (host, card)), strict=True):
            count = len(source) // 4
            if count:
                self.forward.copy(self.stream.cuda_stream, first, count, *places)
            first += count

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self.stream)
        return event
