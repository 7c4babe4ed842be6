"""Writes checkpoints of random weights as quantisation tools do, and beside each the same values in float32."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.gpu_worker.model_driver import TINY

FP8 = torch.float8_e4m3fn
# more than a block wide, with parts of blocks at the edges
MODEL = {**TINY, "hidden_size": 160, "intermediate_size": 272, "num_attention_heads": 6, "num_hidden_layers": 2, "vocab_size": 300}
LEFT_OUT = "model.layers.0.mlp.down_proj"  # a linear that stays as it is, besides lm_head


def fp8(**changes: Any) -> dict[str, Any]:
    """As DeepSeek and Qwen write it: scales of blocks, which they call inverse."""
    how = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    return {**how, "modules_to_not_convert": ["lm_head", LEFT_OUT], **changes}


def compressed(strategy: str, inputs: str, dynamic: bool, **changes: Any) -> dict[str, Any]:
    """As llm-compressor writes it."""
    number = {"num_bits": 8, "type": "float", "symmetric": True}
    weights = {**number, "strategy": strategy, "dynamic": False, "block_structure": [128, 128] if strategy == "block" else None}
    activations = {**number, "strategy": inputs, "dynamic": dynamic, "group_size": 128 if inputs == "group" else None}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    how = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}
    return {**how, "ignore": ["lm_head", "re:.*layers\\.0\\.mlp\\.down_proj$"], **changes}


FORMATS: dict[str, dict[str, Any]] = {
    "blocks": fp8(),
    "matrices": fp8(weight_block_size=None, activation_scheme="static"),
    "compressed rows": compressed("channel", "token", True),
    "compressed matrices": compressed("tensor", "tensor", False),
    "compressed blocks": compressed("block", "group", True),
}


@dataclass
class Checkpoint:
    """A folder in fp8, and one that holds the very same values in float32."""

    folder: Path
    plain: Path
    values: dict[str, torch.Tensor]


def write(root: Path, how: dict[str, Any], extra: dict[str, torch.Tensor] | None = None) -> Checkpoint:
    """extra: further tensors of the fp8 folder."""
    c = MODEL
    generator = torch.Generator().manual_seed(9)
    heads, kv = (c[n] * c["head_dim"] for n in ("num_attention_heads", "num_key_value_heads"))  # type: ignore[operator]
    shapes = {"q_proj": (heads, 160), "k_proj": (kv, 160), "v_proj": (kv, 160), "o_proj": (160, heads)}
    linears = {f"self_attn.{name}": shape for name, shape in shapes.items()}
    linears |= {"mlp.gate_proj": (272, 160), "mlp.up_proj": (272, 160), "mlp.down_proj": (160, 272)}
    stored: dict[str, torch.Tensor] = {}
    values: dict[str, torch.Tensor] = {}
    for name in ("model.embed_tokens", "lm_head"):
        stored[f"{name}.weight"] = torch.randn(300, 160, generator=generator)
    stored["model.norm.weight"] = torch.rand(160, generator=generator) + 0.5
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for norm, width in {
            "input_layernorm": 160,
            "post_attention_layernorm": 160,
            "self_attn.q_norm": 32,
            "self_attn.k_norm": 32,
        }.items():
            stored[f"{prefix}{norm}.weight"] = torch.rand(width, generator=generator) + 0.5
        for name, shape in linears.items():
            # rows and blocks of different sizes, so that a wrong scale shows
            weight = torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator) * shape[1] ** -0.5
            weight[:, 128:] *= 5
            if f"{prefix}{name}" == LEFT_OUT:
                stored[f"{prefix}{name}.weight"] = weight
            else:
                _store(f"{prefix}{name}.", weight, how, stored, values)
    values = {name: tensor for name, tensor in stored.items() if tensor.dtype == torch.float32 and "scale" not in name} | values
    folders = []
    for kind, tensors, more in (("fp8", stored | (extra or {}), {"quantization_config": how}), ("plain", values, {})):
        folder = root / kind
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**MODEL, **more}))
        _tokenizer().save(str(folder / "tokenizer.json"))
        save_file(tensors, folder / "model.safetensors")
        folders.append(folder)
    return Checkpoint(*folders, values)


def _tokenizer() -> Tokenizer:
    """A token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def _store(
    prefix: str, weight: torch.Tensor, how: dict[str, Any], stored: dict[str, torch.Tensor], values: dict[str, torch.Tensor]
) -> None:
    group = how.get("config_groups", {}).get("group_0", {})
    strategy = group["weights"]["strategy"] if group else "block" if how["weight_block_size"] else "tensor"
    rows, columns = weight.shape
    if strategy == "block":
        padded = torch.zeros(math.ceil(rows / 128) * 128, math.ceil(columns / 128) * 128)
        padded[:rows, :columns] = weight
        blocks = padded.view(padded.shape[0] // 128, 128, -1, 128)
        scale = blocks.abs().amax(dim=(1, 3)) / 448
        full = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
    elif strategy == "channel":
        scale = (weight.abs().amax(dim=1, keepdim=True) / 448).bfloat16()
        full = scale.float()
    else:
        scale = weight.abs().max() / 448
        full = scale
    q = (weight / full).clamp(-448, 448).to(FP8)
    stored[f"{prefix}weight"] = q
    stored[prefix + ("weight_scale_inv" if how["quant_method"] == "fp8" and strategy == "block" else "weight_scale")] = scale
    if how.get("activation_scheme") == "static" or (group and not group["input_activations"]["dynamic"]):
        stored[f"{prefix}input_scale"] = torch.tensor([0.02 if "k_proj" in prefix else 0.01])
    values[f"{prefix}weight"] = q.float() * full
