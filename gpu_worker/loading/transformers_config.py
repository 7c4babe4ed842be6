"""Decoders that transformers defines: what they are, read off one forward pass of a model without weights.

The pass runs on torch's meta device, where tensors have shapes and no content, so it takes a second whatever the model's
size. Every layer's call of attention says its heads, scale, cap and mask; what our attention cannot do is refused here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpu_worker.attention.scoring import Scoring
from gpu_worker.errors import LoadError
from gpu_worker.loading.config import FAMILIES, SUPPORTED, DecoderSizes, architecture, from_json

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from gpu_worker.attention.transformers_interface import Call

ALSO = "through transformers decoders like GPT-2, Gemma, Phi and OLMo"
LAYERS = ("full_attention", "sliding_attention")  # the kinds that have pages of keys and values, and nothing else to keep
_MEANINGLESS = {"dropout", "position_ids", "use_cache", "output_attentions", "output_router_logits", "logits_to_keep", "labels"}
_UNDERSTOOD = {"scaling", "softcap", "is_causal", "sliding_window"} | _MEANINGLESS  # the last two are the mask's as well


@dataclass(frozen=True, kw_only=True)
class TransformersConfig(DecoderSizes):
    """A decoder whose code is transformers'. `family` is its `model_type`."""

    architecture: str
    scoring: tuple[Scoring, ...]  # of each layer
    parameters: int  # weights, tied ones once
    tied_embeddings: bool
    limit: int = 0  # tokens up to which it is computed rightly, 0: all of `max_length`
    limited_by: str = ""  # the field that says so
    raw: str  # the config.json
    version: str  # of transformers: another may compute otherwise

    def check_length(self, max_model_len: int) -> None:
        if self.limit and max_model_len > self.limit:
            raise LoadError(
                f"{self.architecture} is served up to {self.limit} tokens only, because of {self.limited_by}: --max-model-len {self.limit}"
            )

    def layer_scoring(self) -> tuple[Scoring, ...]:
        return self.scoring

    def for_transformers(self) -> PretrainedConfig:
        """A new configuration object of transformers. Raises LoadError."""
        return _config(json.loads(self.raw), self.architecture)


def read_config(raw: Mapping[str, Any]) -> DecoderSizes:
    """What a `config.json` describes: one of our families, or a decoder of transformers. Raises LoadError, one line."""
    return from_json(raw) if architecture(raw) in FAMILIES else outline(raw)


def outline(raw: Mapping[str, Any]) -> TransformersConfig:
    """Read a decoder of transformers. Raises LoadError, one line that names the field, for what our attention cannot do."""
    name = architecture(raw)
    if not name:
        raise LoadError(f"config.json names no architectures; supported are {SUPPORTED}, and {ALSO}")
    for field in ("quantization_config", "compression_config"):
        if raw.get(field):
            raise _refusal(name, f"{field}: its weights must have 16 or 32 bits")
    if raw.get("is_encoder_decoder"):
        raise _refusal(name, "is_encoder_decoder: models with an encoder are not served")
    try:
        import torch
        import transformers
        from transformers import AutoModelForCausalLM

        from gpu_worker.attention.transformers_interface import KEYWORD, OUTLINE, register
    except ImportError as error:
        raise LoadError(
            f"architecture {name} is not supported; supported are {SUPPORTED}, and with the extra pagewire[transformers] more ({error})"
        ) from error
    register()
    config = _config(raw, name)
    max_length = _max_length(config, name)
    limit, limited_by = _rope_limit(config, name)
    calls: list[Call] = []

    def note(call: Call) -> torch.Tensor:
        calls.append(call)
        return call.query[..., : call.value.shape[-1]].transpose(1, 2)

    try:
        # bfloat16, since some operations have no other on this device
        with torch.device("meta"), torch.inference_mode():
            model = AutoModelForCausalLM.from_config(config, attn_implementation=OUTLINE, dtype=torch.bfloat16).eval()
            ids, positions, real = torch.zeros((1, 2), dtype=torch.long), torch.arange(2)[None], torch.ones((1, 2), dtype=torch.long)
            output = model(input_ids=ids, position_ids=positions, attention_mask=real, use_cache=False, **{KEYWORD: note})
    except LoadError as error:
        raise _refusal(name, str(error)) from error
    except Exception as error:  # a hundred models' code raises whatever comes to hand
        if "on meta tensors" in str(error):
            where = "rope_parameters: with the rope_type 'longrope' " if limit else ""
            raise _refusal(name, f"{where}its code chooses by what tensors hold, which no config.json tells") from error
        raise _refusal(name, f"transformers cannot compute it from this config.json: {_one_line(error)}") from error
    layers = int(config.num_hidden_layers)
    _check_calls(calls, layers, name)
    return TransformersConfig(
        family=str(config.model_type),
        vocab_size=int(output.logits.shape[-1]),
        hidden=int(config.hidden_size),
        intermediate=int(getattr(config, "intermediate_size", 0) or getattr(config, "ffn_dim", 0) or 4 * config.hidden_size),
        layers=layers,
        heads=calls[0].query.shape[1],
        kv_heads=calls[0].key.shape[1],
        head_dim=calls[0].query.shape[-1],
        max_length=max_length,
        architecture=name,
        scoring=tuple(_scoring(call, name) for call in calls),
        parameters=sum(p.numel() for p in model.parameters()),
        tied_embeddings=_tied(model),
        limit=limit,
        limited_by=limited_by,
        raw=json.dumps(raw, sort_keys=True),
        version=transformers.__version__,
    )


def _config(raw: Mapping[str, Any], name: str) -> PretrainedConfig:
    """transformers' own reading of a config.json; code that the folder may bring along is never looked at."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = str(raw.get("model_type"))
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise LoadError(
            f"architecture {name} is not supported: transformers {transformers.__version__} has no such causal language model; "
            f"supported are {SUPPORTED}, and {ALSO}"
        )
    if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) != name:
        raise _refusal(name, f"model_type {kind!r} is not the type of such a model")
    if not getattr(transformers, name)._supports_attention_backend:
        raise _refusal(name, "transformers gives this model_type no replaceable attention")
    try:
        config = CONFIG_MAPPING[kind].from_dict(dict(raw))
    except Exception as error:  # each configuration validates in its own way
        raise _refusal(name, f"transformers cannot read this config.json: {_one_line(error)}") from error
    for part in config.sub_configs:
        if part in ("text_config", "vision_config", "audio_config"):
            raise _refusal(name, f"{part}: models of more than text are not served")
    for layer in getattr(config, "layer_types", None) or ():
        if layer not in LAYERS:
            raise _refusal(name, f"layer_types: {layer!r} is none of {', '.join(LAYERS)}")
    return config


def _rope_limit(config: PretrainedConfig, name: str) -> tuple[int, str]:
    """Rotary scalings that look at the longest row of a batch would let rows change one another."""
    found = getattr(config, "rope_parameters", None) or {}
    limit = 0
    for rope in [found, *(part for part in found.values() if isinstance(part, dict))]:
        if rope.get("rope_type") == "dynamic":
            raise _refusal(name, "rope_parameters: the rope_type 'dynamic' depends on what runs beside a sequence")
        if rope.get("rope_type") == "longrope":
            limit = int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
    return limit, "rope_parameters: the rope_type 'longrope' turns otherwise beyond" if limit else ""


def _check_calls(calls: list[Call], layers: int, name: str) -> None:
    """One call of each layer, in order, all of one shape, with nothing that is not understood."""
    if [getattr(call.module, "layer_idx", None) for call in calls] != list(range(layers)):
        raise _refusal(name, f"num_hidden_layers: not each of the {layers} layers attends once to its own keys and values")
    heads, kv_heads, head_dim = calls[0].query.shape[1], calls[0].key.shape[1], calls[0].query.shape[-1]
    for call in calls:
        sizes = [(x.shape[1], x.shape[-1]) for x in (call.query, call.key, call.value)]
        if sizes != [(heads, head_dim), (kv_heads, head_dim), (kv_heads, head_dim)]:
            raise _refusal(name, "head_dim: queries, keys and values of all layers must have heads of one size and number")
        for option, value in call.options.items():
            if option not in _UNDERSTOOD and value is not None and value is not False:
                raise _refusal(name, f"{option}: its attention takes what ours does not")
    if heads % kv_heads:
        raise _refusal(name, f"{heads} attention heads are no multiple of {kv_heads} key/value heads")


def _scoring(call: Call, name: str) -> Scoring:
    from gpu_worker.attention.transformers_interface import mask_window

    window = mask_window(call.mask)
    if window is None:
        raise _refusal(name, f"layer_types: layer {call.module.layer_idx} does not attend to all that came before, or to the last of it")
    scale = call.options.get("scaling")
    return Scoring(
        scale=call.query.shape[-1] ** -0.5 if scale is None else float(scale),
        window=window,
        softcap=float(call.options.get("softcap") or 0.0),
    )


def _max_length(config: PretrainedConfig, name: str) -> int:
    length = getattr(config, "max_position_embeddings", None)
    if not length:
        raise _refusal(name, "max_position_embeddings is missing: how long may its sequences be?")
    return int(length)


def _tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _refusal(name: str, why: str) -> LoadError:
    return LoadError(f"architecture {name} is not supported: {why}")


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
