"""Which sizes of steps get a CUDA graph, and when; the graphs themselves are played."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch

from gpu_worker.cuda.graphs import Graphs, Shape, bucket_of, likely_shapes, mixed_bucket
from protocol.messages import Geometry

GEOMETRY = Geometry(
    block_size=16, blocks=500, host_blocks=0, slots=64, max_model_len=512, max_step_tokens=512, vocab_size=1000
)  # fmt: skip
LAYERS = [0, 1, 2, 3]
SHAPE = Shape(4, 0, True)


class Card:
    """Notes what is launched: (shape, layers, whether into a graph)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launched: list[tuple[Shape, list[int], bool]] = []
        self.replays = self.ended = 0
        self.capturing = False
        card = self

        class Graph:
            def capture_begin(self, **options: Any) -> None:
                assert options["capture_error_mode"] == "thread_local"
                card.capturing = True

            def capture_end(self) -> None:
                card.capturing = False
                card.ended += 1

            def replay(self) -> None:
                card.replays += 1

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))

    def body(self, shape: Shape, layers: Any) -> None:
        launched: list[int] = []
        self.launched.append((shape, launched, self.capturing))
        launched.extend(LAYERS if layers is None else layers)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    return Card(monkeypatch)


def test_a_size_is_captured_when_it_is_met_for_the_second_time(card: Card) -> None:
    graphs = Graphs(card.body, LAYERS, True)
    for _ in range(3):
        graphs.run(SHAPE)
    assert card.launched == [(SHAPE, LAYERS, False), (SHAPE, LAYERS, True)]
    assert card.replays == 2


def test_while_idle_one_layer_is_run_and_then_all_are_captured(card: Card) -> None:
    graphs = Graphs(card.body, LAYERS, True)
    assert graphs.missing([SHAPE]) == SHAPE
    graphs.warm_up(SHAPE)
    graphs.capture(SHAPE, lambda: False)
    assert card.launched == [(SHAPE, LAYERS[:1], False), (SHAPE, LAYERS, True)]
    assert graphs.missing([SHAPE]) is None
    graphs.run(SHAPE)
    assert card.replays == 1


def test_a_capture_is_given_up_between_two_layers_and_leaves_no_graph(card: Card) -> None:
    graphs = Graphs(card.body, LAYERS, True)
    graphs.warm_up(SHAPE)
    asked = iter([False, False, True])
    graphs.capture(SHAPE, lambda: next(asked))
    assert card.launched[-1] == (SHAPE, LAYERS[:2], True)
    assert card.ended == 1
    assert graphs.captured == []
    assert graphs.missing([SHAPE]) == SHAPE
    graphs.capture(SHAPE, lambda: False)
    assert graphs.captured == [SHAPE]


def test_without_graphs_none_is_missing(card: Card) -> None:
    assert Graphs(card.body, LAYERS, False).missing([SHAPE]) is None


@pytest.mark.parametrize("slots", [1, 7, 64, 256])
def test_the_likely_sizes_are_those_that_steps_are_rounded_to(slots: int) -> None:
    geometry = msgspec.structs.replace(GEOMETRY, slots=slots)
    shapes = likely_shapes(geometry)
    assert len(set(shapes)) == len(shapes)
    for rows in range(1, slots + 1):
        assert Shape(bucket_of(rows, slots), 0, True) in shapes
    for rows, tokens in ((1, 5), (1, 300), (min(8, slots), 40)):
        sizes = mixed_bucket(rows, tokens, geometry)
        assert sizes is None or Shape(*sizes, True) in shapes
    assert [max(s.rows, s.tokens) for s in shapes] == sorted(max(s.rows, s.tokens) for s in shapes)
