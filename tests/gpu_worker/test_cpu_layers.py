"""What stands between the linears on the CPU: right, and for each row the same bits whatever rows are beside it."""

from __future__ import annotations

import pytest
import torch

from gpu_worker.layers.functions import rotation, silu_mul
from gpu_worker.layers.linear import EightBitRows
from gpu_worker.layers.stream import Stream

ROWS = 300
SOME = (1, 2, 3, 5, 17, 171, ROWS)


@pytest.fixture(params=[1, 2, 3], autouse=True)
def _threads(request: pytest.FixtureRequest) -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("width", [576, 97])
@pytest.mark.parametrize("size", [1.0, 1e-3])  # at the smaller one, eps outweighs the vector
def test_the_stream_is_scaled_to_its_root_mean_square(width: int, size: float) -> None:
    x, weight = _random(ROWS, width) * size, _random(width)
    stream = Stream(x, 1e-5)
    expected = torch.nn.functional.rms_norm(x.double(), (width,), weight.double(), 1e-5)
    assert torch.allclose(stream.normed(weight).double(), expected, rtol=1e-5, atol=1e-6)
    for n in SOME:
        assert torch.equal(Stream(x[:n], 1e-5).normed(weight), stream.normed(weight)[:n])


def test_what_is_added_to_the_stream_is_in_the_norm_and_in_rows_taken_from_it() -> None:
    x, y, weight = _random(ROWS, 64), _random(ROWS, 64).bfloat16(), torch.ones(64)
    stream = Stream(x, 1e-6)
    stream.add(y)
    assert torch.equal(stream.normed(weight), Stream(x + y.float(), 1e-6).normed(weight))
    index = torch.tensor([7, 0, 299])
    assert torch.equal(stream.rows(index).normed(weight), stream.normed(weight)[index])


def test_pairs_are_turned_in_place_each_time() -> None:
    x, angles = _random(ROWS, 4, 64), _random(ROWS, 1, 32)
    turns = torch.polar(torch.ones_like(angles), angles)
    even, odd = x.double()[..., ::2], x.double()[..., 1::2]
    cos, sin = angles.double().cos(), angles.double().sin()
    expected = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    for dtype, room in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        turned = x.to(dtype, copy=True)
        kept = turned[:, 3].clone()
        turn = rotation(turned[:, :3], turns)
        turn()
        assert torch.allclose(turned[:, :3].double(), expected[:, :3], atol=room, rtol=room)
        assert torch.equal(turned[:, 3], kept)
        turned[:, :3] = x[:, :3]
        turn()
        for n in SOME:
            alone = x[:n].to(dtype, copy=True)
            rotation(alone[:, :3], turns[:n])()
            assert torch.equal(alone, turned[:n])


@pytest.mark.parametrize("width", [1536, 160, 40000])
def test_silu_times_up_gives_a_row_the_same_bits_in_any_share_of_rows(width: int) -> None:
    gate_up = _random(ROWS if width < 40000 else 7, 2 * width)
    whole = silu_mul(gate_up)
    gate, up = gate_up.double().chunk(2, dim=1)
    assert torch.allclose(whole.double(), gate * gate.sigmoid() * up, atol=1e-5)
    for n in (n for n in SOME if n <= len(gate_up)):
        assert torch.equal(silu_mul(gate_up[:n]), whole[:n])


def test_the_largest_logits_are_as_fine_as_float32_and_the_same_in_any_batch() -> None:
    x = _random(40, 96)
    weight = _random(2000, 96)
    weight[1234] = weight[7] + _random(96) * 1e-2  # bfloat16 cannot tell these two apart
    head = EightBitRows(weight)
    logits = head(x)
    exact = x.double() @ head.lookup(torch.arange(2000)).double().T
    largest = exact.topk(20).indices
    assert torch.allclose(logits.gather(1, largest).double(), exact.gather(1, largest), rtol=1e-5)
    assert torch.equal(logits.argmax(1), exact.argmax(1))
    for n in (1, 2, 3, 5, 16, 17):
        assert torch.equal(head(x[:n]), logits[:n])
