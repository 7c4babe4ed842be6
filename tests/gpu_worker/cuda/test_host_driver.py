"""Arguments of a launch: where each lies in the buffer."""

from __future__ import annotations

from gpu_worker.cuda.driver import DESCRIPTOR, _places


def test_arguments_lie_where_c_would_put_them() -> None:
    assert _places("PifqiP") == [0, 8, 12, 16, 24, 32]
    assert _places(DESCRIPTOR + "PfP") == [0, 128, 132, 136, 144, 152, 160, 168]
