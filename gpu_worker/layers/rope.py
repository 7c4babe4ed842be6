"""The table of rotary angles, with the three ways of stretching it."""

from __future__ import annotations

import math

import torch

from gpu_worker.loading.config import ModelConfig, RopeScaling


def rope_table(config: ModelConfig, length: int) -> torch.Tensor:
    """Cosines and sines of every position below `length`, each head's first half paired with its second: float32 [length, 2, head_dim].

    First the cosines, once for each half of a head, then the sines, negated for the first half.
    """
    frequencies, magnitude = _frequencies(config)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), dim=1), torch.cat((-sin, sin), dim=1)), dim=1) * magnitude


def turns(config: ModelConfig, length: int) -> torch.Tensor:
    """What functions.rotation multiplies by at every position below `length`: complex64 [length, 1, head_dim / 2]."""
    cos, sin = rope_table(config, length)[:, :, config.head_dim // 2 :].unbind(1)
    return torch.complex(cos.contiguous(), sin.contiguous()).unsqueeze(1)


def pairs_side_by_side(config: ModelConfig, heads: int) -> torch.Tensor:
    """Which rows of a query or key matrix to take, int64 [heads · head_dim], so that what is rotated together lies together.

    Checkpoints pair a head's first half with its second. Products of queries and keys do not feel the order.
    """
    return torch.arange(heads * config.head_dim).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def _frequencies(config: ModelConfig) -> tuple[torch.Tensor, float]:
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    plain = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return plain, 1.0
    if scaling.kind == "linear":
        return plain / scaling.factor, 1.0
    if scaling.kind == "factors":
        return plain / torch.tensor(scaling.factors), 1.0
    if scaling.kind == "llama3":
        return _llama3(plain, scaling), 1.0
    return _yarn(plain, scaling, config), scaling.attention_factor or _yarn_magnitude(scaling)


def _llama3(plain: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Slow frequencies are divided by the factor, fast ones kept, those between blended (Llama 3.1's release)."""
    turns = scaling.original_length * plain / (2 * math.pi)  # full turns within the trained context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return kept * plain + (1 - kept) * plain / scaling.factor


def _yarn(plain: torch.Tensor, scaling: RopeScaling, config: ModelConfig) -> torch.Tensor:
    """NTK by parts (Peng et al. 2023, section 3.2): a ramp between the dimensions that turn beta_fast and beta_slow times."""

    def dimension(turns: float) -> float:
        return config.head_dim * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    ramp = (torch.arange(config.head_dim // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)
    interpolated = ramp.clamp(0.0, 1.0)
    return interpolated * plain / scaling.factor + (1 - interpolated) * plain


def _yarn_magnitude(scaling: RopeScaling) -> float:
    """Peng et al. 2023, section 3.4: the square root of the attention temperature's inverse.

    With weights of the logarithm (DeepSeek-V2's release), that of what is rotated over that of a whole head.
    """
    stretch = math.log(max(scaling.factor, 1.0))
    if not (scaling.mscale and scaling.mscale_all_dim):
        return 0.1 * stretch + 1.0
    return (0.1 * scaling.mscale * stretch + 1.0) / (0.1 * scaling.mscale_all_dim * stretch + 1.0)
