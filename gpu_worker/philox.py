"""Random numbers as a function of (seed, position, token id), the same on every device.

Philox 4x32 with 10 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). Key: the low and the high
32 bits of the choice's seed. Counter: (position, token id // 4, 0, 0), where the position is that of the token to be
sampled, counted from the prompt's first. Of the four words, token id % 4 is the token's own.

A word w becomes u = min(w · 2⁻³² + 2⁻³³, 1 − 2⁻²⁴), in float32, and then the Gumbel variate −log(−log1p(−u)). Large
variates come from small u, where float32 is fine-grained; all lie between GUMBEL_LOW and GUMBEL_HIGH.
"""

from __future__ import annotations

import torch

GUMBEL_LOW = -2.82
GUMBEL_HIGH = 22.88

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_ROUNDS = 10


def philox(key: tuple[torch.Tensor, torch.Tensor], counter: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
    """Four words for each key and counter (c0, c1, 0, 0). All tensors int64 holding 32-bit values, of shapes that broadcast."""
    k0, k1 = key
    c0, c1, c2, c3 = counter[0], counter[1], torch.zeros_like(counter[0]), torch.zeros_like(counter[1])
    for _ in range(_ROUNDS):
        # an int64 product wraps to the low 64 bits of the true one; the mask undoes the sign that >> spreads
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) ^ c1 ^ k0) & _MASK, p1 & _MASK, ((p0 >> 32) ^ c3 ^ k1) & _MASK, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return [c0, c1, c2, c3]


def gumbel(words: torch.Tensor) -> torch.Tensor:
    """Gumbel variates, float32, of int64 words below 2³²."""
    u = words.to(torch.float32).mul_(2.0**-32).add_(2.0**-33).clamp_(max=1.0 - 2.0**-24)
    return torch.log1p(u.neg_()).neg_().log_().neg_()
