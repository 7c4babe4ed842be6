"""Tests of this folder need an NVIDIA card; elsewhere they are skipped, except those that only compile."""

from __future__ import annotations

from pathlib import Path

import pytest


def has_card() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    if has_card():
        return
    for item in items:
        if here in item.path.parents and "compile" not in item.path.name:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA card"))
