"""How a model wants to be sampled and ended: `generation_config.json`, else config and tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from protocol.messages import Defaults


@dataclass(frozen=True)
class Generation:
    """EOS ids, the BOS id (−1: none) and default sampling."""

    eos: list[int]
    bos: int = -1
    defaults: Defaults = field(default_factory=Defaults)


def from_json(generation: Mapping[str, Any], config: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> Generation:
    """From the parsed files of a model folder; a missing file is an empty mapping.

    tokenizer: `tokenizer.json`, where EOS is looked up by `tokenizer_config.json`'s `eos_token` merged in as "eos_token".
    """
    eos = _ids(generation.get("eos_token_id")) or _ids(config.get("eos_token_id")) or _named(tokenizer, "eos_token")
    bos = _ids(generation.get("bos_token_id")) or _ids(config.get("bos_token_id")) or _named(tokenizer, "bos_token")
    defaults = Defaults()
    # a generation config that does not sample is greedy for transformers, yet names no temperature of its own
    temperature = generation.get("temperature")
    return Generation(
        eos=eos,
        bos=bos[0] if bos else -1,
        defaults=Defaults(
            temperature=float(defaults.temperature if temperature is None else temperature),
            top_p=float(generation.get("top_p") or defaults.top_p),
            top_k=int(generation.get("top_k") or defaults.top_k),
            min_p=float(generation.get("min_p") or defaults.min_p),
            repetition_penalty=float(generation.get("repetition_penalty") or defaults.repetition_penalty),
        ),
    )


def from_gguf(metadata: Mapping[str, Any]) -> Generation:
    """From the `tokenizer.ggml.*` keys: EOS and, where it differs, the end-of-turn token."""
    ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    eos = list(dict.fromkeys(int(id) for id in ids if id is not None))
    return Generation(eos=eos, bos=int(metadata.get("tokenizer.ggml.bos_token_id", -1)))


def _ids(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(id) for id in value] if isinstance(value, list) else [int(value)]


def _named(tokenizer: Mapping[str, Any], role: str) -> list[int]:
    name = tokenizer.get(role)
    content = name.get("content") if isinstance(name, dict) else name
    return [int(t["id"]) for t in tokenizer.get("added_tokens", []) if t.get("content") == content][:1] if content else []
