"""What a model's kernels are compiled for: all that compilers are told follows from it.

Neither this nor `kernels_of.py` and what it imports needs torch: kernels are compiled while torch is imported.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpu_worker.cuda.card import Card
from gpu_worker.cuda.memory import Options
from gpu_worker.errors import LoadError
from gpu_worker.loading.config import DecoderSizes, ModelConfig
from gpu_worker.settings import WorkerSettings

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}  # bytes; by torch's names
HEAD_DIMS = (32, 64, 96, 128, 256)
OTHERWISE = "; --attention torch needs none of our kernels"
TILE = 64  # cached tokens in a tile of the decode attention's work list


@dataclass(frozen=True)
class Build:
    """A model, what it is computed and cached in, sizes and switches, a card."""

    config: ModelConfig
    dtype: str  # torch's name: bfloat16, float16, float32
    fp8_cache: bool
    options: Options
    card: Card

    @property
    def repeat(self) -> int:
        """Query heads of a KV head."""
        return self.config.heads // self.config.kv_heads

    @property
    def padded(self) -> int:
        """Rounded up to a power of two."""
        return 1 << (self.repeat - 1).bit_length()

    @property
    def pack(self) -> int:
        """Rows that an item of the decode attention may serve; 1: its own."""
        return max(1, 16 // self.repeat) if self.options.pack_prefixes else 1

    @property
    def tile_tokens(self) -> int:
        """Tokens of a tile of the prefill attention."""
        return max(1, (32 if self.dtype == "float32" else 128) // self.padded)

    @property
    def width(self) -> int:
        """Of the block table."""
        return -(-self.options.max_model_len // self.options.block_size)

    @property
    def window(self) -> int:
        """Tokens that a token sees; 0: all. A model without a window, or whose window no sequence outgrows, pays nothing for it."""
        return self.config.sliding_window if self.config.sliding_window < self.options.max_model_len else 0

    @property
    def pdl(self) -> bool:
        """Whether kernels are launched before those in front of them have ended."""
        return self.options.pdl and self.card.major >= 9


def build_of(settings: WorkerSettings, config: DecoderSizes, card: Card) -> Build:
    """What a worker's settings ask for. Raises LoadError, one line, for what our kernels do not serve."""
    if (card.major, card.minor) < (8, 0):
        raise LoadError(f"the card's compute capability is {card.major}.{card.minor}; the kernels need 8.0{OTHERWISE}")
    if not isinstance(config, ModelConfig):
        raise LoadError(f"our kernels do not serve a {config.family}; --attention torch does, on the card too")
    length = settings.max_model_len or min(4096, config.max_length)
    if length > config.max_length:
        raise LoadError(f"max_model_len {length} is more than the {config.max_length} tokens the model was made for")
    config.check_length(length)
    fp8_cache, dtype = settings.kv_cache_dtype == "fp8", "bfloat16" if settings.dtype == "auto" else settings.dtype
    if fp8_cache and (card.major, card.minor) < (8, 9):
        raise LoadError(f"--kv-cache-dtype fp8 needs compute capability 8.9; the card's is {card.major}.{card.minor}{OTHERWISE}")
    if settings.max_num_seqs > 1024:
        raise LoadError(f"max_num_seqs {settings.max_num_seqs} is more than the 1024 sequences that a card runs at once")
    if config.head_dim not in HEAD_DIMS:
        dims = ", ".join(map(str, HEAD_DIMS))
        raise LoadError(f"head dimension {config.head_dim} is not supported on the card, only {dims} are{OTHERWISE}")
    if config.head_dim * ITEMSIZE[dtype] > 512:
        raise LoadError(f"head dimension {config.head_dim} is not supported in {dtype} on the card; bfloat16 is{OTHERWISE}")
    if config.heads // config.kv_heads > 16:
        raise LoadError(
            f"{config.heads // config.kv_heads} query heads per key/value head are not supported on the card; up to 16 are{OTHERWISE}"
        )
    if config.hidden % 8 or config.intermediate % 8:
        raise LoadError(
            f"hidden size {config.hidden} and intermediate size {config.intermediate} must be multiples of 8 on the card{OTHERWISE}"
        )
    options = Options(
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.step_tokens(),
        max_model_len=length,
        block_size=settings.block_size,
        num_blocks=settings.num_gpu_blocks,
        host_blocks=settings.num_cpu_blocks,
        utilization=settings.gpu_memory_utilization,
        graphs=not settings.enforce_eager,
        filter_kernel=settings.filter_kernel,
        pack_prefixes=settings.pack_prefixes,
    )
    return Build(config, dtype, fp8_cache, options, card)
