"""A pytest plugin (`-p tests.no_torch`): what a frontend or scheduler host does not install cannot be imported."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MISSING = ("torch", "transformers", "triton", "accelerate")


class _Missing(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"{name} is not to be imported here", name=name)
        return None


sys.meta_path.insert(0, _Missing())
