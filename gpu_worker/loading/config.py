"""What a model is: sizes, rotary embedding, norms. Read from a `config.json` or from GGUF metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from gpu_worker.attention.scoring import Scoring, plain
from gpu_worker.errors import LoadError
from gpu_worker.loading.quantization import Quantization
from gpu_worker.loading.quantization import from_json as quantization_from_json

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
SUPPORTED = "the Llama, Mistral, Qwen2 and Qwen3 families of dense text models"
ROPE_KINDS = ("linear", "llama3", "yarn")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context; fields as in `config.json`.

    `factors`, if given, divides each of the head_dim / 2 frequencies (GGUF keeps Llama 3's scaling that way).
    """

    kind: str  # linear, llama3, yarn, factors
    factor: float = 1.0
    original_length: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    attention_factor: float = 0.0  # yarn: of the embedding's magnitude; 0: from the fields above and below
    mscale: float = 0.0  # yarn; both or neither count
    mscale_all_dim: float = 0.0
    truncate: bool = True
    factors: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DecoderSizes:
    """What everything but the model itself has to know of a decoder. Lengths are in elements, contexts in tokens."""

    family: str
    vocab_size: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_length: int

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.kv_heads * self.head_dim

    def check_length(self, max_model_len: int) -> None:
        """Raise LoadError if sequences of this length need what the model code does not do."""

    def layer_scoring(self) -> tuple[Scoring, ...]:
        """How each layer scores keys."""
        return plain(self.layers, self.head_dim)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(DecoderSizes):
    """A decoder of the Llama family: llama, mistral, qwen2 or qwen3."""

    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tied_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    sliding_window: int = 0  # 0: none
    dtype: str = "float32"  # the file's
    quantization: Quantization | None = None

    def check_length(self, max_model_len: int) -> None:
        if self.sliding_window and self.family != "mistral" and max_model_len > self.sliding_window:
            raise LoadError(
                f"sliding-window attention is not supported for a {self.family}: this model attends to {self.sliding_window} tokens; "
                f"serve it with --max-model-len {self.sliding_window}"
            )

    def layer_scoring(self) -> tuple[Scoring, ...]:
        """A Mistral's window is every layer's."""
        window = self.sliding_window if self.family == "mistral" else 0
        return (Scoring(self.head_dim**-0.5, window),) * self.layers


def architecture(config: Mapping[str, Any]) -> str:
    """The first name in a `config.json`'s `architectures`, or "" if there is none."""
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def from_json(config: Mapping[str, Any]) -> ModelConfig:
    """The configuration of a `config.json`. Raises LoadError, one line, for what is not supported."""
    name = architecture(config)
    family = FAMILIES.get(name)
    if family is None:
        raise LoadError(f"architecture {name or 'none named'} is not supported; supported are {SUPPORTED}")
    if config.get("hidden_act", "silu") != "silu":
        raise LoadError(f"activation {config['hidden_act']!r} is not supported; silu is")
    if config.get("mlp_bias"):
        raise LoadError("biases in the MLP are not supported")
    quantization = quantization_from_json(config)
    try:
        return replace(_from_json(config, family), quantization=quantization)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be used: {error}"
        raise LoadError(f"config.json {what}") from error


def _from_json(config: Mapping[str, Any], family: str) -> ModelConfig:
    heads = int(config["num_attention_heads"])
    hidden = int(config["hidden_size"])
    biased = bool(config.get("attention_bias", family == "qwen2"))
    # transformers 5 writes theta and scaling together
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    max_length = int(config["max_position_embeddings"])
    return _checked(
        ModelConfig(
            family=family,
            vocab_size=int(config["vocab_size"]),
            hidden=hidden,
            intermediate=int(config["intermediate_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or (128 if family == "qwen3" else hidden // heads)),  # transformers' defaults
            max_length=max_length,
            norm_eps=float(config["rms_norm_eps"]),
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
            rope_scaling=_scaling_from_json(rope, max_length),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=biased or family == "qwen2",
            o_bias=biased and family in ("llama", "qwen3"),
            qk_norm=family == "qwen3",
            sliding_window=_sliding_window(config, family),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch."),
        )
    )


def _sliding_window(config: Mapping[str, Any], family: str) -> int:
    if family.startswith("qwen") and not config.get("use_sliding_window", False):
        return 0
    return int(config.get("sliding_window") or 0) if family != "llama" else 0


def _scaling_from_json(rope: Mapping[str, Any], max_length: int) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind not in ROPE_KINDS:
        raise LoadError(f"rope scaling {kind!r} is not supported; supported are {', '.join(ROPE_KINDS)}")
    return RopeScaling(
        kind=kind,
        factor=float(rope["factor"]),
        original_length=int(rope.get("original_max_position_embeddings") or max_length),
        low_freq_factor=float(rope.get("low_freq_factor", 1.0)),
        high_freq_factor=float(rope.get("high_freq_factor", 4.0)),
        beta_fast=float(rope.get("beta_fast") or 32.0),
        beta_slow=float(rope.get("beta_slow") or 1.0),
        attention_factor=float(rope.get("attention_factor") or 0.0),
        mscale=float(rope.get("mscale") or 0.0),
        mscale_all_dim=float(rope.get("mscale_all_dim") or 0.0),
        truncate=bool(rope.get("truncate", True)),
    )


def from_gguf(metadata: Mapping[str, Any], vocab_size: int, tied: bool, qkv_bias: bool, factors: tuple[float, ...]) -> ModelConfig:
    """The configuration in a GGUF file's metadata; what it leaves to the tensors is given. Raises LoadError.

    vocab_size: rows of the embedding. tied: no output matrix. factors: the `rope_freqs` tensor, if there is one.
    """
    arch = metadata.get("general.architecture", "none")
    if arch not in ("llama", "qwen2", "qwen3"):
        raise LoadError(f"GGUF architecture {arch!r} is not supported; supported are {SUPPORTED}")
    if metadata.get(f"{arch}.expert_count"):
        raise LoadError(f"mixture-of-experts models are not supported; supported are {SUPPORTED}")

    def of(key: str, *default: Any) -> Any:
        if f"{arch}.{key}" not in metadata and not default:
            raise LoadError(f"the GGUF file lacks {arch}.{key}")
        return metadata.get(f"{arch}.{key}", *default)

    heads, hidden = int(of("attention.head_count")), int(of("embedding_length"))
    head_dim = int(of("attention.key_length", hidden // heads))
    max_length = int(of("context_length"))
    scaling: RopeScaling | None = None
    kind = of("rope.scaling.type", "none")
    if factors:
        scaling = RopeScaling(kind="factors", factors=factors)
    elif kind in ("linear", "yarn"):
        scaling = RopeScaling(
            kind=kind,
            factor=float(of("rope.scaling.factor")),
            original_length=int(of("rope.scaling.original_context_length", max_length)),
        )
    elif kind != "none":
        raise LoadError(f"rope scaling {kind!r} is not supported; supported are {', '.join(ROPE_KINDS)}")
    return _checked(
        ModelConfig(
            family=arch,
            vocab_size=vocab_size,
            hidden=hidden,
            intermediate=int(of("feed_forward_length")),
            layers=int(of("block_count")),
            heads=heads,
            kv_heads=int(of("attention.head_count_kv", heads)),
            head_dim=head_dim,
            max_length=max_length,
            norm_eps=float(of("attention.layer_norm_rms_epsilon")),
            rope_theta=float(of("rope.freq_base", 10000.0)),
            rope_scaling=scaling,
            tied_embeddings=tied,
            qkv_bias=qkv_bias,
            qk_norm=arch == "qwen3",
            sliding_window=int(of("attention.sliding_window", 0)),
        )
    )


def _checked(config: ModelConfig) -> ModelConfig:
    for field in ("vocab_size", "hidden", "intermediate", "layers", "heads", "kv_heads", "head_dim", "max_length"):
        if getattr(config, field) <= 0:
            raise LoadError(f"the model's {field} is {getattr(config, field)}")
    if config.heads % config.kv_heads:
        raise LoadError(f"{config.heads} attention heads are no multiple of {config.kv_heads} key/value heads")
    if config.head_dim % 2:
        raise LoadError(f"head dimension {config.head_dim} is odd")
    return config
