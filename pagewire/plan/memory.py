"""How many bytes a worker takes for a model: weights as they are kept, KV blocks, buffers of a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pagewire.plan.sizes import Q4_0, Q4_1, Q8_0, ModelSizes, PlanError, Sizes, TransformersSizes, read_sizes

MIB = 1 << 20
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
FP8_GROUP = 128  # fp8 weights of a row that may share a scale
FP8_MULTIPLE = 16  # of rows and columns that cuBLAS multiplies in fp8
GROUP = 32  # 4-bit weights that share a scale and a zero
CUDA_CONTEXT = 512 * MIB  # the driver's own, and kernels: outside torch's allocator
CUDA_WORKSPACE = 32 * MIB  # cuBLAS's, which torch allocates on a Hopper card
CPU_PROCESS = 350 * MIB  # interpreter and libraries
TRANSFORMERS = 110 * MIB  # transformers, and what of torch it imports


@dataclass(frozen=True)
class Setup:
    """What a worker would be started with; names and defaults are the worker's. Lengths are in tokens."""

    device: str = "cuda"  # cuda, cpu
    dtype: str = "auto"  # auto: bfloat16 on cuda; on the CPU float32, or a GGUF's weights as packed as they are
    quantization: str = "auto"  # auto: as the model is; fp8
    kv_cache_dtype: str = "auto"  # auto: dtype; fp8
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 0  # 0: the worker's choice for the device
    max_model_len: int = 0  # 0: min(4096, the model's)
    gpu_memory_utilization: float = 0.9

    def __post_init__(self) -> None:
        """Raises PlanError, naming the field, for a value that no worker takes."""
        if self.device not in ("cuda", "cpu"):
            raise PlanError(f"device: {self.device!r} is neither cuda nor cpu")
        if self.dtype != "auto" and self.dtype not in BYTES:
            raise PlanError(f"dtype: {self.dtype!r} is none of auto, {', '.join(BYTES)}")
        for name in ("quantization", "kv_cache_dtype"):
            if getattr(self, name) not in ("auto", "fp8"):
                raise PlanError(f"{name}: {getattr(self, name)!r} is neither auto nor fp8")
        if self.device == "cpu" and self.dtype not in ("auto", "float32"):
            raise PlanError(f"dtype: {self.dtype} is not supported on the CPU; float32 and auto are")
        for name, least in (("block_size", 1), ("max_num_seqs", 1), ("max_num_batched_tokens", 0), ("max_model_len", 0)):
            if getattr(self, name) < least:
                raise PlanError(f"{name}: {getattr(self, name)} is less than {least}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise PlanError(f"gpu_memory_utilization: {self.gpu_memory_utilization} is not above 0 and at most 1")

    @property
    def step_tokens(self) -> int:
        """Tokens of the largest step."""
        from gpu_worker.settings import CPU_STEP_TOKENS, STEP_TOKENS

        return self.max_num_batched_tokens or (CPU_STEP_TOKENS if self.device == "cpu" else STEP_TOKENS)

    @property
    def element(self) -> int:
        """Bytes of one activation."""
        return BYTES[self.dtype if self.dtype != "auto" else "bfloat16" if self.device == "cuda" else "float32"]

    @property
    def cached(self) -> int:
        """Bytes of one cached number."""
        return 1 if self.kv_cache_dtype == "fp8" else self.element


@dataclass(frozen=True)
class Memory:
    """Bytes. `total(blocks)` is what a worker allocates with that many blocks; `overhead` comes on top, outside the allocator."""

    parameters: int  # how many weights the model has, not bytes
    weights: int
    kv_per_token: int
    kv_per_block: int
    activations: int  # buffers and temporaries of the largest step, logits, tables
    overhead: int  # the process's, the driver's, and on a card what is kept back for graphs
    parts: dict[str, int] = field(default_factory=dict)  # `weights`, by kind

    def total(self, blocks: int) -> int:
        """Bytes allocated with this many blocks; the cache has one more, which dead rows write to."""
        return self.weights + self.activations + (blocks + 1) * self.kv_per_block


def estimate_memory(model: str | Path | Sizes, setup: Setup | None = None) -> Memory:
    """What a worker with this model and setup takes. Raises PlanError for a model that no worker loads."""
    from gpu_worker.sampling_memory import KEPT_BACK

    sizes = read_sizes(model) if isinstance(model, str | Path) else model
    setup = setup or Setup()
    config = sizes.config
    per_token = 2 * config.layers * config.kv_size * setup.cached
    if isinstance(sizes, TransformersSizes):
        parameters, parts, activations = sizes.config.parameters, _plain_weights(sizes, setup), _torch_buffers(sizes, setup)
        overhead = CUDA_CONTEXT if setup.device == "cuda" else CPU_PROCESS + TRANSFORMERS
    else:
        parameters, parts = _parameters(sizes), _weights(sizes, setup)
        overhead = CUDA_CONTEXT + KEPT_BACK if setup.device == "cuda" else CPU_PROCESS
        activations = _cuda_buffers(sizes, setup) if setup.device == "cuda" else _torch_buffers(sizes, setup)
    return Memory(
        parameters=parameters,
        weights=sum(parts.values()),
        kv_per_token=per_token,
        kv_per_block=per_token * setup.block_size,
        activations=activations,
        overhead=overhead,
        parts=parts,
    )


def length_limit(sizes: Sizes, setup: Setup) -> int:
    """The max_model_len of a worker. Raises PlanError if it is more than the model was made for, or than its code does rightly."""
    from gpu_worker.errors import LoadError

    if setup.max_model_len > sizes.config.max_length:
        raise PlanError(f"max_model_len: {setup.max_model_len} is more than the {sizes.config.max_length} tokens of the model")
    length = setup.max_model_len or min(4096, sizes.config.max_length)
    try:
        sizes.config.check_length(length)
    except LoadError as error:
        raise PlanError(str(error)) from error
    return length


def _plain_weights(sizes: TransformersSizes, setup: Setup) -> dict[str, int]:
    """Bytes of the weights where all have one type; on the CPU a tied table is kept in one layout to look up, in another to multiply."""
    c = sizes.config
    if setup.quantization == "fp8":
        raise PlanError(f"quantization: fp8 is not supported for a {c.family}")
    again = c.vocab_size * c.hidden if setup.device == "cpu" and c.tied_embeddings else 0
    return {"all": c.parameters * setup.element} | ({"output": again * setup.element} if again else {})


@dataclass(frozen=True)
class _Matrix:
    """A fused linear: out × in, and what it stacks: GGUF tensors, or modules."""

    out: int
    into: int
    tensors: tuple[str, ...]
    modules: tuple[str, ...]


def _matrices(sizes: ModelSizes, layer: int) -> dict[str, list[_Matrix]]:
    c = sizes.config

    def matrix(out: int, into: int, parts: dict[str, str]) -> _Matrix:
        tensors = tuple(f"blk.{layer}.{tensor}.weight" for tensor in parts.values())
        return _Matrix(out, into, tensors, tuple(f"model.layers.{layer}.{module}" for module in parts))

    return {
        "attention": [
            matrix(c.q_size + 2 * c.kv_size, c.hidden, {f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"}),
            matrix(c.hidden, c.q_size, {"self_attn.o_proj": "attn_output"}),
        ],
        "mlp": [
            matrix(2 * c.intermediate, c.hidden, {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}),
            matrix(c.hidden, c.intermediate, {"mlp.down_proj": "ffn_down"}),
        ],
    }


def _vector_elements(sizes: ModelSizes) -> int:
    """Elements of all norms and biases."""
    c = sizes.config
    layer = 2 * c.hidden + 2 * c.head_dim * c.qk_norm + (c.q_size + 2 * c.kv_size) * c.qkv_bias + c.hidden * c.o_bias
    return c.layers * layer + c.hidden


def _parameters(sizes: ModelSizes) -> int:
    c = sizes.config
    matrices = sum(m.out * m.into for kind in _matrices(sizes, 0).values() for m in kind)
    return c.layers * matrices + _vector_elements(sizes) + c.vocab_size * c.hidden * (1 if c.tied_embeddings else 2)


def _weights(sizes: ModelSizes, setup: Setup) -> dict[str, int]:
    """Bytes of the weights by kind, as the worker of the device keeps them."""
    c = sizes.config
    if setup.quantization == "fp8" and sizes.quantised:
        raise PlanError(f"quantization: fp8 rounds weights of 16 or 32 bits; those of {sizes.name} have fewer")
    packed = setup.device == "cpu" and setup.dtype == "auto" and sizes.quantised
    parts = {"embedding": 0, "attention": 0, "mlp": 0, "norms and biases": _vector_elements(sizes) * setup.element}
    for layer in range(c.layers):
        for kind, matrices in _matrices(sizes, layer).items():
            parts[kind] += sum(_matrix_bytes(sizes, m, setup, packed) for m in matrices)
    table = c.vocab_size * c.hidden * setup.element
    eight = c.vocab_size * (c.hidden + 2)  # int8 and a 16-bit scale a row
    small = packed and _kinds(sizes, ("token_embd.weight",)) == {Q8_0}
    parts["embedding"] = eight if small else table
    if not c.tied_embeddings:
        parts["output"] = eight if packed and _kinds(sizes, ("output.weight",)) == {Q8_0} else table
    elif setup.device == "cpu" and not small:
        parts["output"] = table  # rows are looked up in one layout and multiplied in another
    return parts


def _matrix_bytes(sizes: ModelSizes, matrix: _Matrix, setup: Setup, packed: bool) -> int:
    elements = matrix.out * matrix.into
    if (scales := _fp8_scales(sizes, matrix, setup)) is not None:
        return elements + 4 * scales
    four_bit = packed and _kinds(sizes, matrix.tensors) <= {Q4_0, Q4_1} and matrix.out % 16 == 0 and matrix.into % GROUP == 0
    return elements // 2 + elements // GROUP * 4 if four_bit else elements * setup.element


def _fp8_scales(sizes: ModelSizes, matrix: _Matrix, setup: Setup) -> int | None:
    """How many scales a matrix has that is kept in fp8; None: it is not. A card that multiplies fp8 takes these shapes."""
    quantization = sizes.config.quantization
    if setup.device == "cpu" or setup.dtype not in ("auto", "bfloat16") or (quantization is None and setup.quantization != "fp8"):
        return None
    if quantization is not None and not all(quantization.covers(module) for module in matrix.modules):
        return None
    groups = -(-matrix.into // FP8_GROUP) if quantization is not None and quantization.by_block else 1
    if matrix.out % FP8_MULTIPLE or matrix.into % (FP8_MULTIPLE if groups == 1 else FP8_GROUP):
        return None
    return matrix.out * groups


def fp8_matrices(sizes: Sizes, setup: Setup) -> list[_Matrix]:
    """The linears that are kept in fp8, of all layers."""
    if isinstance(sizes, TransformersSizes):
        return []
    every = (matrix for layer in range(sizes.config.layers) for kind in _matrices(sizes, layer).values() for matrix in kind)
    return [matrix for matrix in every if _fp8_scales(sizes, matrix, setup) is not None]


def _kinds(sizes: ModelSizes, names: tuple[str, ...]) -> set[int]:
    return {sizes.tensors[name].kind if name in sizes.tensors else -1 for name in names}


def _cuda_buffers(sizes: ModelSizes, setup: Setup) -> int:
    """Buffers of `gpu_worker/cuda`, allocated once for the largest step, and what sampling takes where all rows ask for everything."""
    from gpu_worker.sampling_memory import sampling_bytes

    c, slots, tokens, length = sizes.config, setup.max_num_seqs, setup.step_tokens, length_limit(sizes, setup)
    step = tokens * (2 * c.hidden + 2 * c.q_size + 2 * c.kv_size + 3 * c.intermediate)
    logits = slots * c.vocab_size
    rotary = length * c.head_dim * 4
    tables = 4 * slots * -(-length // setup.block_size)
    widest = max((matrix.into for matrix in fp8_matrices(sizes, setup)), default=0)
    rounded = tokens * (widest + 4 * -(-widest // FP8_GROUP))  # activations before a product in fp8, and their scales
    return (step + logits) * setup.element + sampling_bytes(slots, c.vocab_size) + rounded + rotary + tables + CUDA_WORKSPACE


def _torch_buffers(sizes: Sizes, setup: Setup) -> int:
    """What attention works in, which is kept, and the largest step's temporaries in float32: a layer's at its widest, or the
    logits, which come after the layers; and the veils of late keys, a quarter of all where their number is rounded up most.
    """
    from gpu_worker.attention.units import Units

    c, length = sizes.config, length_limit(sizes, setup)
    units = Units(c.heads, c.kv_heads, c.head_dim)
    veils = setup.step_tokens * units.per_kv * (length // 4)
    attention = 3 * c.hidden + 3 * (c.q_size + 2 * c.kv_size) + c.q_size
    mlp = 3 * c.hidden + 6 * c.intermediate
    logits = min(setup.max_num_seqs, setup.step_tokens) * c.vocab_size * 2
    return 4 * (units.scratch(length) + veils + max(setup.step_tokens * max(attention, mlp), logits) + length * c.head_dim)
