"""One step of a real model in torch: slots and blocks on one side, the model on the other."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import psutil
import torch

from gpu_worker.attention.backends import check_backend, make_backend
from gpu_worker.attention.interface import Attention, CacheShape, Rows, new_cache
from gpu_worker.attention.stores import Fp8Cache
from gpu_worker.errors import LoadError
from gpu_worker.loading.config import ModelConfig
from gpu_worker.loading.kv_scales import kv_scales
from gpu_worker.loading.model_files import ModelFiles, fingerprint, open_model
from gpu_worker.loading.transformers_config import TransformersConfig
from gpu_worker.logprobs import NO_LOGPROBS, PromptScores, columns
from gpu_worker.models.decoder import Decoder
from gpu_worker.models.llama import Llama
from gpu_worker.models.weights import CpuMaker, DenseMaker, LinearMaker, load_weights
from gpu_worker.prompt_scores import Asked, asked
from gpu_worker.runner import Description, Outcome, RowScores, Step
from gpu_worker.sampler import Sampler
from gpu_worker.settings import WorkerSettings
from gpu_worker.slots import BlockTables
from gpu_worker.stops import SlotEnds
from gpu_worker.transfer import Arrival
from gpu_worker.worst_case import blocks_that_fit, measure, worst_step
from protocol.columns import Int32, unpack
from protocol.memory import give_back_freed
from protocol.messages import Geometry, Plan
from protocol.tokenizer_files import bundle_hash

_CACHE_BYTES = 2 << 30  # of keys and values on the CPU, unless the number of blocks is given
_CACHE_SHARE = 0.4  # of the memory available, at most

log = logging.getLogger("worker")


class TorchStep:
    """A loaded model, its cache, and the device state of every slot. `attention`: the name of what computes it."""

    def __init__(
        self, model: Decoder, attention: Attention, cache: torch.Tensor, geometry: Geometry, threads: int, begun: Callable[[], None]
    ) -> None:
        self._threads = threads
        self._model = model
        self._attention = attention
        self.attention, self.geometry = attention.name, geometry
        self._cache = cache
        self._host_cache = torch.zeros((cache.shape[0], geometry.host_blocks, *cache.shape[2:]), dtype=cache.dtype)
        self._device = cache.device
        self._vocab_size = geometry.vocab_size
        self._begun = begun
        self._tables = BlockTables(geometry.slots, geometry.table_width)
        self._sampler = Sampler(geometry.slots, geometry.vocab_size, cache.device)
        self._ends = SlotEnds(geometry.slots, cache.device)

    @staticmethod
    @torch.inference_mode()
    def load(settings: WorkerSettings, threads: int, begun: Callable[[], None]) -> tuple[TorchStep, Description]:
        """Load the model and allocate its cache: on a card, of what is left beside a step that takes most. Raises LoadError, one line."""
        torch.set_num_threads(threads)
        files = open_model(settings)
        config = files.config
        length = settings.max_model_len or min(4096, config.max_length)
        if length > config.max_length:
            raise LoadError(f"max_model_len {length} is more than the {config.max_length} tokens the model was made for")
        config.check_length(length)
        device, dtype, packed, maker = _placement(settings, files)
        fp8_cache = settings.kv_cache_dtype == "fp8"
        check_backend(settings.attention, device, dtype, settings.block_size, config.head_dim, fp8_cache)
        model = _load(settings, files, length, device, dtype, maker)
        cached = torch.uint8 if fp8_cache else dtype
        fp8 = Fp8Cache(dtype, _kv_scales(files, device, dtype)) if fp8_cache else None

        def step_with(blocks: int) -> TorchStep:
            shape = CacheShape(config.layers, blocks, config.kv_heads, settings.block_size, config.head_dim)
            geometry = Geometry(
                block_size=shape.block_size,
                blocks=blocks,
                host_blocks=settings.num_cpu_blocks,
                slots=settings.max_num_seqs,
                max_model_len=length,
                max_step_tokens=settings.step_tokens(cpu=device.type == "cpu"),
                vocab_size=config.vocab_size,
            )
            cache = new_cache(shape, device, cached)
            attention = make_backend(settings.attention, cache, shape, config.heads, config.layer_scoring(), fp8)
            return TorchStep(model, attention, cache, geometry, threads, begun)

        block = CacheShape(config.layers, 1, config.kv_heads, settings.block_size, config.head_dim).elements_per_block * cached.itemsize
        needed = -(-length // settings.block_size)
        if device.type == "cuda":
            trial = step_with(1)
            try:
                usage = measure(lambda: trial.run(worst_step(trial.geometry, long=True)))
            except torch.OutOfMemoryError as error:
                raise LoadError(f"the card's memory does not hold the model with its largest step: {str(error).splitlines()[0]}") from error
            del trial
            blocks = blocks_that_fit(usage, settings.gpu_memory_utilization, block, needed, settings.num_gpu_blocks)
        else:
            blocks = _blocks_on_cpu(settings, block, needed, length)
        step = step_with(blocks)
        dtype_name = str(dtype).removeprefix("torch.")
        description = Description(
            model=files.name,
            fingerprint=fingerprint(files, dtype_name, packed, "fp8" if fp8_cache else dtype_name, _fp8_linears(model)),
            geometry=step.geometry,
            attention=step.attention,
            eos=files.generation.eos,
            bos=files.generation.bos,
            defaults=files.generation.defaults,
            tokenizer=bundle_hash(files.bundle),
            bundle=files.bundle,
        )
        give_back_freed()
        return step, description

    @torch.inference_mode()
    def run(self, step: Step) -> Outcome:
        """Compute one step, to its end."""
        self._apply(step)
        if not len(step.slots):
            return Outcome(tokens=np.zeros(0, np.int32), flags=np.zeros(0, np.uint8), copied=step.plan.step)
        torch.set_num_threads(self._threads)
        reported = asked(step)
        logits, hidden = self._forward(step, reported)
        slots = step.output_slots
        sampled = self._sampler.sample(logits, slots, step.output_positions)
        settled = self._ends.settle(self._sampler.on_device(slots), sampled.tokens)
        rows, told = sampled.reported, sampled.told
        tokens, flags, *arrived = Arrival(*settled, *(told.tensors if told else ())).read()
        lp = columns(rows.rows, rows.wanted, tokens, *arrived) if rows else NO_LOGPROBS
        return Outcome(
            tokens=tokens,
            flags=flags.astype(np.uint8),
            copied=step.plan.step,
            lp_counts=lp.counts,
            lp_ids=lp.ids,
            lp_values=lp.values,
            lp_ranks=lp.ranks,
            scores=[] if reported is None else self._scores(reported, hidden),
        )

    def _scores(self, reported: Asked, hidden: torch.Tensor) -> list[RowScores]:
        return PromptScores(reported, self._index(reported.tokens), lambda part: self._model.logits(hidden[part])).read()

    @torch.inference_mode()
    def reset(self) -> None:
        """Forget all slots; blocks keep their content."""
        self._tables.clear()
        self._ends.dead.zero_()

    def _apply(self, step: Step) -> None:
        """Bindings, table entries and copies of a plan."""
        plan = step.plan
        self._tables.apply(plan)
        for slot, record in zip(step.bind_slots.tolist(), step.bind_records, strict=True):
            self._sampler.bind(slot, record)
            self._ends.bind(slot, record)
        if plan.assign_blocks:
            # attention multiplies what lies behind a row's end by zero, which only a NaN survives
            self._cache.index_fill_(1, self._blocks(plan.assign_blocks), 0.0)
        self._copy(plan)

    def _copy(self, plan: Plan) -> None:
        cache, host = self._cache, self._host_cache
        if plan.copy_to:
            cache.index_copy_(1, self._blocks(plan.copy_to), cache.index_select(1, self._blocks(plan.copy_from)))
        if plan.out_to:
            host.index_copy_(1, self._blocks(plan.out_to).cpu(), cache.index_select(1, self._blocks(plan.out_from)).cpu())
        if plan.in_to:
            cache.index_copy_(1, self._blocks(plan.in_to), host.index_select(1, self._blocks(plan.in_from).cpu()).to(self._device))

    def _blocks(self, column: bytes) -> torch.Tensor:
        return self._index(unpack(column))

    def _forward(self, step: Step, reported: Asked | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits of each output, [outputs, vocab], and the hidden states behind the positions that are reported."""
        counts = step.counts.astype(np.int64)
        ends = np.cumsum(counts)
        nth = np.arange(int(ends[-1])) - np.repeat(ends - counts, counts)
        last_token, dead = (column.cpu().numpy()[step.slots] for column in (self._ends.last_token, self._ends.dead))
        ids = np.repeat(last_token, counts)
        ids[nth < np.repeat(step.known, counts)] = step.prefill
        positions = nth + np.repeat(step.starts, counts)
        self._attention.begin(Rows(step.starts, step.counts, self._tables.table[step.slots], dead != 0))
        sampling = np.flatnonzero(step.outputs > 0)
        wanted = ends[sampling] - 1
        if reported is not None:
            wanted = np.concatenate((wanted, reported.behind))
        hidden = self._model.forward(self._index(ids), self._index(positions), self._index(wanted), self._attention, self._begun)
        logits, rest = self._model.logits(hidden[: len(sampling)]), hidden[len(sampling) :]
        if not len(step.fork_rows):
            return logits, rest
        rank = np.cumsum(step.outputs > 0) - 1  # which of the logits a row's are
        return logits[self._index(np.concatenate((rank[sampling], rank[step.fork_rows])))], rest

    def _index(self, values: npt.NDArray[np.int64] | Int32) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(self._device)


def _placement(settings: WorkerSettings, files: ModelFiles) -> tuple[torch.device, torch.dtype, bool, LinearMaker]:
    """Device, dtype of activations and cache, whether weights stay packed, and the maker of linears."""
    if settings.device == "cuda" or (settings.device == "auto" and torch.cuda.is_available()):
        if not torch.cuda.is_available():
            raise LoadError("device cuda is asked for, and torch finds no usable GPU or driver")
        dtype = {"auto": torch.bfloat16, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[settings.dtype]
        device = torch.device("cuda")
        return device, dtype, False, DenseMaker(device, dtype)
    if settings.dtype not in ("auto", "float32"):
        raise LoadError(f"dtype {settings.dtype} is not supported on the CPU; float32 and auto (a GGUF's weights kept packed) are")
    packed = settings.dtype == "auto" and files.quantised
    if isinstance(files.config, ModelConfig) and files.config.quantization is not None:
        log.info("fp8 weights are kept as float32 on the CPU, and activations are not rounded: its products in 8 bits are slower")
    return torch.device("cpu"), torch.float32, packed, CpuMaker(packed)


def _load(
    settings: WorkerSettings, files: ModelFiles, length: int, device: torch.device, dtype: torch.dtype, maker: LinearMaker
) -> Decoder:
    config = files.config
    if isinstance(config, ModelConfig):
        return Llama(config, load_weights(config, files.tensors(device, dtype), maker), length, device)
    assert isinstance(config, TransformersConfig)
    from gpu_worker.models.transformers_model import load_transformers

    return load_transformers(config, files.path, device, dtype, settings.seed if settings.load_format == "dummy" else None)


def _fp8_linears(model: Decoder) -> int:
    return model.weights.fp8_linears if isinstance(model, Llama) else 0


def _kv_scales(files: ModelFiles, device: torch.device, dtype: torch.dtype) -> list[tuple[float, float]]:
    if not isinstance(files.config, ModelConfig):
        return [(1.0, 1.0)] * files.config.layers
    return kv_scales(files.tensors(device, dtype), files.config.layers)


def _blocks_on_cpu(settings: WorkerSettings, block: int, needed: int, length: int) -> int:
    """As many blocks as asked for, or as the memory allows. Raises LoadError if one sequence of full length has no room.

    block: bytes of one. needed: blocks of a sequence of `length` tokens.
    """
    blocks = settings.num_gpu_blocks or min(_CACHE_BYTES, int(_CACHE_SHARE * psutil.virtual_memory().available)) // block - 1
    if blocks < needed:
        raise LoadError(
            f"{max(blocks, 0)} blocks of {settings.block_size} tokens hold no sequence of {length} tokens, which needs {needed}: "
            f"lower --max-model-len or raise --num-gpu-blocks ({block * needed / 2**20:.0f} MiB)"
        )
    return blocks
