"""Finds what makes a thread wait for a device, without one: tensors of the device `meta` have shapes and no values.

Whatever needs a value (`item`, `bool(tensor)`, a boolean index, `nonzero`, `unique`) cannot be computed for them and raises. Copies
between host and device are noted, so that a test can say which there may be.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")


class Copies(TorchDispatchMode):
    """Counts copies to and from `meta`; those to the host are left out, since there is nothing to be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.in_, self.out = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.copy_.default and args[0].device != META and args[1].device == META:
            assert args[2:] == (True,), "a copy to the host that is waited for"
            self.out += 1
            return args[0]
        result = func(*args, **kwargs)
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        if isinstance(result, torch.Tensor) and result.device == META and any(t.device != META and t.dim() for t in tensors):
            assert kwargs.get("non_blocking"), f"{func} copies to the device and is waited for"
            self.in_ += 1
        return result
