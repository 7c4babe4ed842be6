"""An fp8 cache of keys and values: what it holds, that nothing around a row changes a bit, and what tells it from another."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from gpu_worker.attention.interface import CacheShape, Rows, new_cache
from gpu_worker.attention.stores import Fp8Cache, Fp8Store
from gpu_worker.attention.torch_backend import TorchAttention
from gpu_worker.errors import LoadError
from protocol.messages import SamplingParams
from tests.gpu_worker.fp8_checkpoints import FORMATS, write
from tests.gpu_worker.model_driver import generate, greedy, load, load_packaged, load_tiny, wander
from tests.gpu_worker.test_attention_torch import Sequences, _tables
from tests.gpu_worker.test_prompt_scores import score
from tests.gpu_worker.worker_plans import draw_sequences

CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn


def _attention(sequences: Sequences, block_size: int, blocks: int, units: tuple[float, float]) -> TorchAttention:
    shape = CacheShape(1, blocks, sequences.kv_heads, block_size, sequences.dim)
    cache = new_cache(shape, CPU, torch.uint8)
    return TorchAttention(cache, shape, sequences.heads, [sequences.scoring], Fp8Cache(torch.float32, [units]))


def _rounded(kv: torch.Tensor, units: tuple[float, float]) -> torch.Tensor:
    """kv: [..., 2 · kv_heads, dim] through the cache, in float64."""
    halves = [(x.float() / unit).clamp(-448, 448).to(FP8).double() * unit for x, unit in zip(kv.chunk(2, -2), units, strict=True)]
    return torch.cat(halves, -2)


@pytest.mark.parametrize("units", [(1.0, 1.0), (0.25, 3.0)])
@pytest.mark.parametrize("block_size", [8, 40, 256])
def test_attention_is_over_keys_and_values_in_fp8(block_size: int, units: tuple[float, float]) -> None:
    sequences = Sequences(2, 6, 2, 16)
    tables, blocks = _tables(2, block_size)
    attention = _attention(sequences, block_size, blocks, units)
    steps = ([(0, 0, 150), (1, 0, 1)], [(0, 150, 151), (1, 1, 2)], [(0, 151, 420), (1, 2, 9)], [(1, 9, 10), (0, 420, 421)])
    answers = [sequences.step(attention, rows, tables).double() for rows in steps]
    exact = torch.cat([sequences.reference(*row) for row in steps[-1]])
    sequences.kv = _rounded(sequences.kv, units)
    for rows, answer in zip(steps, answers, strict=True):
        assert torch.allclose(answer, torch.cat([sequences.reference(*row) for row in rows]), atol=3e-6)
    assert 0.005 < float((answers[-1] - exact).norm() / exact.norm()) < 0.06


def test_what_is_too_large_is_cut_and_nan_stays_nan() -> None:
    shape = CacheShape(1, 2, 1, 4, 8)
    store = Fp8Store(new_cache(shape, CPU, torch.uint8), shape, 4, Fp8Cache(torch.float32, [(2.0, 0.5)]))
    kv = torch.zeros(1, 2, 8)
    kv[0, :, 0], kv[0, :, 1], kv[0, :, 2], kv[0, :, 3] = 1e6, -1e6, float("nan"), float("inf")
    store.write(0, torch.tensor([4, 8]), kv)
    out = torch.empty(2, 4 * 8)
    store.read(0, torch.tensor([1, 2]), out)
    for row, most in zip(out, (896.0, 224.0), strict=True):
        assert row[[0, 1, 3]].tolist() == [most, -most, most]
        assert row[2].isnan()
        assert not row[4:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_byte_is_read_as_torch_reads_it(dtype: torch.dtype) -> None:
    shape = CacheShape(1, 1, 1, 16, 16)
    cache = new_cache(shape, CPU, torch.uint8)
    cache[0, 0] = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(2, 1, 16, 16)
    out = torch.empty(2, 256, dtype=dtype)
    Fp8Store(cache, shape, 16, Fp8Cache(dtype, [(1.0, 1.0)])).read(0, torch.tensor([0, 1]), out)
    expected = torch.arange(256, dtype=torch.uint8).view(FP8).to(dtype)
    for half in out:
        assert torch.equal(half.nan_to_num(777), expected.nan_to_num(777))


@pytest.mark.slow
def test_neither_batch_nor_chunks_nor_blocks_change_a_bit() -> None:
    sequences = Sequences(3, 6, 3, 32)
    tables, blocks = _tables(3, 16)
    attention = _attention(sequences, 16, blocks, (1.0, 1.0))
    alone = [torch.cat([sequences.step(attention, [(s, i, i + 1)], tables) for i in range(300)]) for s in range(3)]
    tables, blocks = _tables(3, 48, seed=5)
    attention = _attention(sequences, 48, blocks, (1.0, 1.0))
    for spans in ([(0, 0, 70), (1, 0, 1)], [(1, 1, 300), (2, 0, 33), (0, 70, 71)], [(2, 33, 300), (0, 71, 300)]):
        expected = torch.cat([alone[s][start:stop] for s, start, stop in spans])
        assert torch.equal(sequences.step(attention, spans, tables), expected)


def test_a_dead_row_writes_to_the_dummy_page_alone() -> None:
    sequences = Sequences(2)
    tables, blocks = _tables(2, 16)
    shape = CacheShape(1, blocks, sequences.kv_heads, 16, sequences.dim)
    cache = new_cache(shape, CPU, torch.uint8)
    attention = TorchAttention(cache, shape, sequences.heads, None, Fp8Cache(torch.float32, [(1.0, 1.0)]))
    attention.begin(Rows(np.zeros(2, np.int32), np.full(2, 5, np.int32), tables, np.array([True, False])))
    attention.attend(0, sequences.q[:, :5].flatten(0, 1), sequences.kv[:, :5].flatten(0, 1))
    assert cache[0, shape.dummy].any()
    assert not cache[0, tables[0]].any()
    assert cache[0, tables[1, 0]].any()


@pytest.mark.parametrize("seed", range(2))
def test_random_plans_with_swaps_and_forks_give_each_sequence_what_it_gets_alone(tmp_path: Path, seed: int) -> None:
    loaded = load_tiny(tmp_path, num_cpu_blocks=20, max_num_batched_tokens=200, kv_cache_dtype="fp8")
    sampled = SamplingParams(max_tokens=12, temperature=0.9, top_p=0.95, top_k=50)
    sequences = draw_sequences(Random(seed), 10, loaded.description.geometry, [greedy(14), sampled])
    everything = [s for parent in sequences for s in (parent, *parent.children)]
    wander(loaded, sequences, seed)
    for s in everything:
        assert generate(loaded, [s.prompt], [s.params], [s.seed]) == [s.known], f"sequence {s.record}"


@pytest.mark.slow
@pytest.mark.model
def test_the_real_model_s_log_probabilities_are_little_changed() -> None:
    """Of its own greedy continuation; the packaged model is small, so its answers do change here and there."""
    kinds = [load_packaged("auto", max_model_len=512, num_gpu_blocks=40, kv_cache_dtype=kind) for kind in ("auto", "fp8")]
    prompt = [(37 * i) % 40000 for i in range(40)]
    text = prompt + generate(kinds[0], [prompt], [greedy(100)], [0])[0]
    told = [score(loaded, [text], [0], first=len(prompt))[0] for loaded in kinds]
    plain, fp8 = (np.array([pairs[0][1] for pairs, _ in positions]) for positions in told)
    assert len(plain) == len(fp8) == 100
    assert 0 < abs(plain - fp8).mean() < 0.15
    assert np.mean([rank == 1 for _, rank in told[1]]) > 0.9


def test_units_of_the_checkpoint_are_used(tmp_path: Path) -> None:
    """With units so small that everything is cut, the answers are others; with good ones they are what they were without."""
    prompts, params = [[(17 * i) % 300 for i in range(90)]], [greedy(10)]
    tokens = []
    for i, unit in enumerate((None, 1.0, 1e-5)):
        folder = tmp_path / str(i)
        folder.mkdir()
        names = [f"model.layers.{layer}.self_attn.{kind}_scale" for layer in range(2) for kind in "kv"]
        extra = {} if unit is None else {name: torch.tensor([unit]) for name in names}
        checkpoint = write(folder, FORMATS["compressed rows"], extra)
        loaded = load(model=str(checkpoint.folder), kv_cache_dtype="fp8", num_gpu_blocks=40, max_model_len=256, max_num_seqs=4)
        tokens.append(generate(loaded, prompts, params, [0]))
    assert tokens[0] == tokens[1]
    assert tokens[0] != tokens[2]


def test_a_unit_that_scales_nothing_is_refused(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, FORMATS["blocks"], {"model.layers.1.self_attn.k_proj.k_scale": torch.tensor(0.0)})
    with pytest.raises(LoadError, match=r"model\.layers\.1\.self_attn\.k_proj\.k_scale is 0\.0, which scales no keys"):
        load(model=str(checkpoint.folder), kv_cache_dtype="fp8", num_gpu_blocks=40, max_model_len=256)


def test_a_unit_for_each_head_is_refused(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, FORMATS["blocks"], {"model.layers.1.self_attn.v_scale": torch.ones(2, 1, 1)})
    with pytest.raises(LoadError, match=r"model\.layers\.1\.self_attn\.v_scale has shape \[2, 1, 1\]; a tensor of one element"):
        load(model=str(checkpoint.folder), kv_cache_dtype="fp8", num_gpu_blocks=40, max_model_len=256)


def test_blocks_of_another_type_are_never_taken_for_these(tmp_path: Path) -> None:
    """Workers with one fingerprint form one model, and only theirs are each other's blocks."""
    plain, fp8 = (load_tiny(tmp_path, kv_cache_dtype=kind).description for kind in ("auto", "fp8"))
    assert plain.fingerprint != fp8.fingerprint
    assert plain.geometry == fp8.geometry


def test_a_block_takes_a_byte_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_worker.torch_step._CACHE_BYTES", 3 << 20)
    plain, fp8 = (load_tiny(tmp_path, num_gpu_blocks=0, kv_cache_dtype=kind).description.geometry.blocks for kind in ("auto", "fp8"))
    assert (plain, fp8) == ((3 << 20) // (3 * 2 * 2 * 16 * 32 * 4) - 1, (3 << 20) // (3 * 2 * 2 * 16 * 32) - 1)


def test_flash_attn_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="flash_attn reads no fp8 cache"):
        load_tiny(tmp_path, kv_cache_dtype="fp8", attention="flash_attn")
