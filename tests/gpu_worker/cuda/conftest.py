"""Tests of this folder need an NVIDIA card and are skipped elsewhere, except those in files named test_host_…."""

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
    mine = [item for item in items if here in item.path.parents and not item.path.name.startswith("test_host")]
    if mine and not has_card():
        for item in mine:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA card"))
