"""The units of keys and values in an fp8 cache: what a checkpoint was calibrated with, else 1."""

from __future__ import annotations

import math

from gpu_worker.errors import LoadError
from gpu_worker.loading.source import TensorSource

# llm-compressor's names, and those of older tools
_NAMES = (("k_scale", "v_scale"), ("k_proj.k_scale", "v_proj.v_scale"), ("k_proj.output_scale", "v_proj.output_scale"))


def kv_scales(source: TensorSource, layers: int) -> list[tuple[float, float]]:
    """Of each layer's keys and of its values: cached value = e4m3 number · unit. Raises LoadError for one that is no positive number."""
    return [_of_layer(source, f"model.layers.{layer}.self_attn.") for layer in range(layers)]


def _of_layer(source: TensorSource, prefix: str) -> tuple[float, float]:
    for names in _NAMES:
        found = [source.number(prefix + name) for name in names]
        if found == [None, None]:
            continue
        units = [1.0 if unit is None else unit for unit in found]
        for name, unit in zip(names, units, strict=True):
            if not (unit > 0 and math.isfinite(unit)):
                raise LoadError(f"{prefix}{name} is {unit}, which scales no keys or values")
        return units[0], units[1]
    return 1.0, 1.0
