"""What a checkpoint's `quantization_config` says of its weights: fp8 (e4m3), scaled by matrix, row or block, or a refusal."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpu_worker.errors import LoadError

SUPPORTED = "supported are fp8, compressed-tensors of format float-quantized, unquantised safetensors and GGUF"
FP8_GROUP = 128  # weights of a row that may share a scale
BLOCK = [FP8_GROUP, FP8_GROUP]


@dataclass(frozen=True)
class Quantization:
    """e4m3 weights, before whose products activations are rounded to e4m3 as well (W8A8).

    Whether a certain weight is e4m3, its file says; `covers` is for those who have not read it.
    """

    scales: str  # name of a weight's scales, in the place of `weight`
    by_block: bool  # of 128 × 128 weights and, in activations, of 128 neighbours; else of a row or a matrix, and of a token
    static: bool  # activations are scaled by the checkpoint's `input_scale`, not by what they are
    left_out: tuple[str, ...] = ()  # modules that are not quantised, or "re:" and a regular expression

    def covers(self, module: str) -> bool:
        """Whether a linear (`model.layers.0.mlp.up_proj`) has e4m3 weights; embedding and head are not computed in 8 bits."""
        return module.startswith("model.layers.") and not any(
            re.match(name[3:], module) is not None if name.startswith("re:") else f".{name}." in f".{module}." for name in self.left_out
        )


ROUNDED = Quantization("weight_scale", by_block=False, static=False)  # by `online.py`


def from_json(config: Mapping[str, Any]) -> Quantization | None:
    """What a `config.json` says; None if nothing. Raises LoadError, one line naming the field, for what is not supported."""
    found = config.get("quantization_config") or config.get("compression_config")
    if not found:
        return None
    if not isinstance(found, dict):
        raise LoadError("quantization_config is no JSON object")
    method = found.get("quant_method")
    if method == "fp8":
        return _fp8(found)
    if method == "compressed-tensors":
        return _compressed(found)
    raise LoadError(f"quantization_config.quant_method: {method or 'unknown'} quantised weights are not supported; {SUPPORTED}")


def _fp8(found: Mapping[str, Any]) -> Quantization:
    """DeepSeek's and Qwen's: blocks, whose scales are called inverse. Without blocks: a scale of each matrix."""
    _expect(found, "fmt", "e4m3", None, "float8_e4m3fn")
    _expect(found, "activation_scheme", "dynamic", "static", None)
    _expect(found, "weight_block_size", BLOCK, None)
    by_block, static = bool(found.get("weight_block_size")), found.get("activation_scheme") == "static"
    if by_block and static:
        raise LoadError("quantization_config.activation_scheme is 'static' with weight_block_size; supported is 'dynamic'")
    left_out = found.get("modules_to_not_convert") or found.get("ignored_layers") or ()
    return Quantization("weight_scale_inv" if by_block else "weight_scale", by_block, static, tuple(map(str, left_out)))


def _compressed(found: Mapping[str, Any]) -> Quantization:
    """compressed-tensors' (llm-compressor's): one scheme for all linears that `ignore` does not name."""
    groups = found.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise LoadError("quantization_config.config_groups must hold one group, for all linears")
    name, group = next(iter(groups.items()))
    if not isinstance(group, dict):
        raise LoadError(f"quantization_config.config_groups.{name} is no JSON object")
    path = f"config_groups.{name}."
    formats = {"format": group.get("format") or found.get("format")}
    _expect(formats, "format", "float-quantized", also=SUPPORTED)
    _expect(found.get("sparsity_config") or {}, "format", "dense", None, path="sparsity_config.")
    _expect(group, "targets", ["Linear"], path=path)
    weights, inputs = group.get("weights") or {}, group.get("input_activations") or {}
    for values, of in ((weights, path + "weights."), (inputs, path + "input_activations.")):
        _expect(values, "num_bits", 8, path=of)
        _expect(values, "type", "float", path=of)
        _expect(values, "symmetric", True, None, path=of)
    _expect(weights, "dynamic", False, None, path=path + "weights.")
    _expect(weights, "strategy", "channel", "tensor", "block", path=path + "weights.")
    by_block = weights["strategy"] == "block"
    path += "input_activations."
    if by_block:
        _expect(weights, "block_structure", BLOCK, "128x128", path=f"config_groups.{name}.weights.")
        _expect(inputs, "group_size", 128, path=path)
    _expect(inputs, "strategy", *(("group",) if by_block else ("token", "tensor")), path=path)
    _expect(inputs, "dynamic", *((True,) if by_block or inputs["strategy"] == "token" else (False, True)), path=path)
    left_out = tuple(map(str, found.get("ignore") or ()))
    return Quantization("weight_scale", by_block, not inputs["dynamic"], left_out)


def _expect(found: Mapping[str, Any], field: str, *supported: Any, path: str = "", also: str = "") -> None:
    """Raise LoadError, naming the field, if it has another value; None stands for an absent one."""
    if found.get(field) not in supported:
        names = also or "supported is " + " or ".join(repr(value) for value in supported if value is not None)
        raise LoadError(f"quantization_config.{path}{field} is {found.get(field)!r}; {names}")
