"""The residual stream: what every layer reads, normalised, and adds to."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


class Stream:
    """The vectors of some tokens, [rows, width], in the dtype they came in.

    RMS norm (Zhang & Sennrich 2019) is √width · x / √(Σx² + width · eps): what a vector is, scaled to length √width, if
    √(width · eps) is appended to it. torch scales rows to a length in one operation, the one of weight normalisation, with
    the same bits for a row whatever rows are beside it; so on the CPU the stream is kept with that element.
    """

    def __init__(self, x: torch.Tensor, eps: float) -> None:
        self._eps = eps
        self._width = x.shape[1]
        if x.is_cuda:
            self._x = x
            return
        self._wide = F.pad(x, (0, 1), value=math.sqrt(self._width * eps))
        self._x = self._wide[:, : self._width]
        self._length = x.new_full((x.shape[0], 1), math.sqrt(self._width))

    def normed(self, weight: torch.Tensor) -> torch.Tensor:
        """RMS norm times `weight` [width]; a new tensor."""
        if self._x.is_cuda:
            return F.rms_norm(self._x, (self._width,), weight, self._eps)
        scaled: torch.Tensor = torch._weight_norm_interface(self._wide, self._length, 0)[0]
        return scaled[:, : self._width] * weight

    def add(self, y: torch.Tensor) -> None:
        """y: [rows, width], any float dtype."""
        self._x.add_(y if y.dtype == self._x.dtype else y.to(self._x.dtype))  # adding two dtypes takes torch longer

    def new_empty(self, width: int) -> torch.Tensor:
        """Room beside the stream, [rows, width], of its dtype."""
        return self._x.new_empty(self._x.shape[0], width)

    def rows(self, index: torch.Tensor) -> Stream:
        """Some of the rows, int64 [n], as a stream of their own."""
        return Stream(self._x[index], self._eps)
