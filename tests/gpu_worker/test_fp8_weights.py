"""fp8 weights: every way in which checkpoints store them, products, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpu_worker.cuda.weights import load_weights as kernel_weights
from gpu_worker.errors import LoadError
from gpu_worker.layers.fp8 import Fp8Linear, round_groups, round_rows, to_fp8
from gpu_worker.layers.linear import DenseLinear
from gpu_worker.loading import config as configs
from gpu_worker.loading.dummy import DummyTensors
from gpu_worker.loading.model_files import fingerprint, open_model
from gpu_worker.loading.online import RoundedToFp8
from gpu_worker.loading.quantization import from_json
from gpu_worker.loading.safetensors import SafetensorsFolder
from gpu_worker.loading.source import Fp8, Piece, Shard, layer_pieces, vocabulary_piece
from gpu_worker.models.weights import DenseMaker, load_weights, stack_fp8, stack_rows
from gpu_worker.settings import WorkerSettings
from tests.gpu_worker.fp8_checkpoints import FORMATS, LEFT_OUT, MODEL, Checkpoint, compressed, fp8, write
from tests.gpu_worker.model_driver import TINY, generate, greedy, load
from tests.gpu_worker.test_load_files import _write_gguf

CPU = torch.device("cpu")
SIZES = {"num_gpu_blocks": 60, "max_model_len": 256, "max_num_seqs": 8}
PROMPTS = [[5, 200, 17, 31], [(11 * i) % 300 for i in range(150)]]


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.fixture(scope="module", params=FORMATS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write(tmp_path_factory.mktemp("checkpoint"), FORMATS[request.param])


def _source(checkpoint: Checkpoint) -> tuple[SafetensorsFolder, configs.ModelConfig]:
    files = open_model(WorkerSettings(run_dir=Path("unused"), model=str(checkpoint.folder)))
    assert isinstance(files.config, configs.ModelConfig)
    source = files.tensors(CPU, torch.float32)
    assert isinstance(source, SafetensorsFolder)
    return source, files.config


def test_a_checkpoint_gives_the_tokens_of_its_values_in_float32(checkpoint: Checkpoint) -> None:
    params = [greedy(12)] * 2
    rounded, plain = (
        generate(load(model=str(f), **SIZES), PROMPTS, params, [0, 0], chunk=70) for f in (checkpoint.folder, checkpoint.plain)
    )
    assert rounded == plain
    assert len({tuple(tokens) for tokens in rounded}) == 2


def test_pieces_are_dequantised_wherever_they_begin(checkpoint: Checkpoint) -> None:
    source, _ = _source(checkpoint)
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight", f"{LEFT_OUT}.weight", "lm_head.weight"):
        whole = checkpoint.values[name]
        rows, columns = whole.shape
        for span in ((0, columns), (0, 128), (128, columns), (40, 141)):
            piece = Piece(name, (13, rows - 2), span)
            assert torch.equal(source.read(piece).float(), whole[13 : rows - 2, slice(*span)])
            stored = source.fp8(piece)
            if stored is not None:
                assert torch.equal(stored.values(), whole[13 : rows - 2, slice(*span)])
        assert (source.fp8(Piece(name, (0, rows), (0, columns))) is None) == (name.startswith((LEFT_OUT, "lm_head")))


def test_fused_linears_keep_each_part_s_scales_and_the_largest_input_scale(checkpoint: Checkpoint) -> None:
    source, config = _source(checkpoint)
    pieces = layer_pieces(config, 1, Shard())
    for fused in (pieces.qkv, pieces.gate_up, pieces.o, pieces.down):
        stacked = stack_fp8(source, fused, CPU)
        assert stacked is not None
        assert torch.equal(stacked.values(), stack_rows(source, fused, CPU, torch.float32))
        assert (stacked.input_scale is not None) == (config.quantization is not None and config.quantization.static)
        if stacked.input_scale is not None:
            assert float(stacked.input_scale) == pytest.approx(0.02 if fused is pieces.qkv else 0.01)
    assert stack_fp8(source, layer_pieces(config, 0, Shard()).down, CPU) is None


def test_a_product_of_rows_is_off_by_the_rounding_of_its_factors() -> None:
    generator = torch.Generator().manual_seed(1)
    x, bias = torch.randn(9, 160, generator=generator) * torch.logspace(-3, 3, 9)[:, None], torch.randn(48, generator=generator)
    weights = Fp8(*round_rows(torch.randn(48, 160, generator=generator)))
    q, scale = round_rows(x)
    exact = x.double() @ weights.values().double().T
    rounded = (q.double() * scale.double()) @ weights.values().double().T
    got = Fp8Linear(weights, None)(x)
    for row in range(9):  # each has its own scale
        assert _error(got[row], rounded[row]) < 0.004  # bf16
        assert _error(got[row], exact[row]) < 0.05
    assert _error(Fp8Linear(weights, bias)(x), rounded + bias) < 0.004
    x[4, 3] = float("nan")
    spoilt = Fp8Linear(weights, None)(x)
    assert torch.isnan(spoilt[4]).all()
    assert torch.equal(spoilt[:4], got[:4])


def test_a_static_scale_cuts_what_is_larger() -> None:
    weights = Fp8(*round_rows(torch.eye(32)), torch.tensor(0.01))
    x = torch.zeros(2, 32)
    x[0, 0], x[1, 1] = 3.0, 100.0
    y = Fp8Linear(weights, None)(x)
    assert float(y[0, 0]) == pytest.approx(3.0, rel=1 / 16)
    assert float(y[1, 1]) == pytest.approx(4.48, rel=0.01)


def test_rounding_keeps_relative_size_in_rows_and_groups_and_nan_stays() -> None:
    x = torch.randn(5, 384, generator=torch.Generator().manual_seed(2)) * torch.logspace(-7, 2, 384)
    for q, scale in (round_rows(x), round_groups(x)):
        assert q.dtype == torch.float8_e4m3fn
        assert float(q.float().abs().max()) == 448
        assert _error(Fp8(q, scale).values(), x) < 0.03
    fine, coarse = (_error(Fp8(*how(x)).values()[:, :128], x[:, :128]) for how in (round_groups, round_rows))
    assert fine < coarse, "a group's scale is its own"
    assert torch.equal(round_rows(torch.zeros(2, 8))[0].float(), torch.zeros(2, 8))
    odd = to_fp8(torch.tensor([1e9, -1e9, float("inf"), float("nan"), 0.3]))
    assert odd[:3].tolist() == [448, -448, 448]
    assert torch.isnan(odd[3].float())


def test_a_plain_model_can_be_rounded_while_it_is_read(tmp_path: Path) -> None:
    plain = write(tmp_path, FORMATS["blocks"]).plain
    settings = WorkerSettings(run_dir=Path("unused"), model=str(plain))
    as_it_is, rounded = (open_model(s) for s in (settings, WorkerSettings(run_dir=Path("unused"), model=str(plain), quantization="fp8")))
    assert fingerprint(as_it_is, "float32", False, "float32", 0) != fingerprint(rounded, "float32", False, "float32", 0)
    source = rounded.tensors(CPU, torch.float32)
    assert isinstance(source, RoundedToFp8)
    for name, (rows, columns) in {"model.layers.0.mlp.up_proj.weight": (272, 160), "lm_head.weight": (300, 160)}.items():
        piece = Piece(name, (0, rows), (0, columns))
        exact = as_it_is.tensors(CPU, torch.float32).read(piece)
        assert _error(source.read(piece), exact) < 0.03
        assert torch.equal(source.read(piece), exact) == (name == "lm_head.weight")
    tokens = generate(load(model=str(plain), quantization="fp8", **SIZES), PROMPTS, [greedy(6)] * 2, [0, 0])
    assert [len(t) for t in tokens] == [6, 6]


@pytest.mark.parametrize("kind", FORMATS)
def test_random_weights_of_an_fp8_model_are_fp8_where_the_model_s_are(tmp_path: Path, kind: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**MODEL, "quantization_config": FORMATS[kind]}))
    for flag in ("auto", "fp8"):
        files = open_model(WorkerSettings(run_dir=tmp_path, model=str(tmp_path), load_format="dummy", quantization=flag))
        assert isinstance(files.config, configs.ModelConfig)
        how = files.config.quantization
        assert how is not None
        source = files.tensors(CPU, torch.float32)
        exact = DummyTensors(files.config, 0, CPU, torch.float32)
        pieces = layer_pieces(files.config, 0, Shard())
        for piece in (*pieces.qkv, *pieces.o, *pieces.gate_up):
            made = source.fp8(piece)
            assert made is not None
            rows, columns = piece.size
            assert made.q.shape == (rows, columns)
            assert made.scale.shape == (rows, -(-columns // 128) if how.by_block else 1)
            assert (made.input_scale is not None) == how.static
            assert torch.equal(made.values(), source.read(piece))
            assert 0.01 < _error(made.values(), exact.read(piece)) < 0.04
        assert source.fp8(pieces.down[0]) is None, "left out"
        assert source.fp8(vocabulary_piece(files.config, "lm_head.weight")) is None


def _fp8_head(root: Path) -> Path:
    """A checkpoint whose head is in fp8 as well."""
    q, scale = torch.ones(300, 160).to(torch.float8_e4m3fn), torch.ones(3, 2)
    return write(root, fp8(modules_to_not_convert=[LEFT_OUT]), {"lm_head.weight": q, "lm_head.weight_scale_inv": scale}).folder


@pytest.mark.parametrize(
    ("dtype", "multiplied", "linears"), [(torch.bfloat16, True, 7), (torch.bfloat16, False, 0), (torch.float16, True, 0)]
)
def test_linears_are_fp8_in_bfloat16_where_the_device_multiplies_it_and_the_head_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, multiplied: bool, linears: int
) -> None:
    files = open_model(WorkerSettings(run_dir=tmp_path, model=str(_fp8_head(tmp_path))))
    assert isinstance(files.config, configs.ModelConfig)
    monkeypatch.setattr(Fp8Linear, "fits", lambda weights, device: multiplied)
    weights = load_weights(files.config, files.tensors(CPU, dtype), DenseMaker(CPU, dtype))
    for_kernels = kernel_weights(files.tensors(CPU, dtype), files.config, CPU, dtype, Shard())
    assert [weights.fp8_linears, for_kernels.fp8_linears] == [linears] * 2
    assert isinstance(weights.head, DenseLinear)
    assert weights.head.weight.dtype == for_kernels.head.dtype == dtype


def test_workers_that_compute_one_checkpoint_in_8_bits_and_in_16_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path, FORMATS["blocks"]).folder
    monkeypatch.setattr("gpu_worker.torch_step._placement", lambda *_: (CPU, torch.bfloat16, False, DenseMaker(CPU, torch.bfloat16)))
    prints = []
    for multiplied in (True, False, True):
        monkeypatch.setattr(Fp8Linear, "fits", lambda weights, device, answer=multiplied: answer)
        prints.append(load(model=str(folder), **SIZES).description.fingerprint)
    assert prints[0] == prints[2] != prints[1]


def test_what_cannot_be_rounded_is_refused(tmp_path: Path) -> None:
    _write_gguf(tmp_path / "m.gguf")
    with pytest.raises(LoadError, match=r"--quantization fp8 rounds weights of 16 or 32 bits; those of m\.gguf have fewer"):
        open_model(WorkerSettings(run_dir=Path("unused"), model=str(tmp_path / "m.gguf"), quantization="fp8"))


def test_left_out_modules_are_known_without_the_file() -> None:
    for how in FORMATS.values():
        found = from_json({"quantization_config": how})
        assert found is not None
        assert not found.covers("model.embed_tokens")
        assert [found.covers(m) for m in ("lm_head", LEFT_OUT, "model.layers.1.mlp.down_proj", "model.layers.0.mlp.up_proj")] == [
            False, False, True, True,
        ]  # fmt: skip
    assert from_json({}) is None


def _group(**changes: Any) -> dict[str, Any]:
    how = compressed("channel", "token", True)
    how["config_groups"]["group_0"] |= changes
    return how


NUMBER = {"num_bits": 8, "type": "float"}


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"quant_method": "gptq"}, "quantization_config.quant_method: gptq quantised weights are not supported; supported are fp8"),
        ({}, None),
        ({"bits": 4}, "quantization_config.quant_method: unknown"),
        (fp8(weight_block_size=[64, 64]), "quantization_config.weight_block_size is [64, 64]; supported is [128, 128]"),
        (fp8(fmt="e5m2"), "quantization_config.fmt is 'e5m2'"),
        (fp8(activation_scheme="static"), "quantization_config.activation_scheme is 'static' with weight_block_size"),
        (compressed("channel", "token", True, format="pack-quantized"), "quantization_config.format is 'pack-quantized'; supported are"),
        (compressed("channel", "token", True, config_groups={}), "quantization_config.config_groups must hold one group"),
        (compressed("channel", "group", True), "quantization_config.config_groups.group_0.input_activations.strategy is 'group'"),
        (compressed("group", "token", True), "quantization_config.config_groups.group_0.weights.strategy is 'group'"),
        (compressed("channel", "token", False), "quantization_config.config_groups.group_0.input_activations.dynamic is False"),
        (_group(targets=["re:.*mlp.*"]), "quantization_config.config_groups.group_0.targets is ['re:.*mlp.*']"),
        (_group(weights={**NUMBER, "num_bits": 4}), "quantization_config.config_groups.group_0.weights.num_bits is 4; supported is 8"),
        (_group(weights={**NUMBER, "type": "int"}), "quantization_config.config_groups.group_0.weights.type is 'int'"),
        (_group(input_activations=None), "quantization_config.config_groups.group_0.input_activations.num_bits is None"),
        ({**compressed("channel", "token", True), "sparsity_config": {"format": "sparse-24"}}, "sparsity_config.format is 'sparse-24'"),
    ],
)
def test_other_quantisation_is_refused_in_one_line_that_names_the_field(how: dict[str, Any], says: str | None) -> None:
    if says is None:
        assert configs.from_json({**TINY, "quantization_config": how}).quantization is None
        return
    with pytest.raises(LoadError) as refusal:
        configs.from_json({**TINY, "quantization_config": how})
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_file_that_its_config_does_not_explain_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, FORMATS["blocks"]).folder
    piece = Piece("model.layers.0.self_attn.q_proj.weight", (0, 192), (0, 160))
    rows = from_json({"quantization_config": FORMATS["compressed rows"]})
    with pytest.raises(LoadError, match=r"q_proj\.weight is fp8, and config\.json has no quantization_config"):
        SafetensorsFolder(folder).read(piece)
    with pytest.raises(LoadError, match=r"lacks the tensor model\.layers\.0\.self_attn\.q_proj\.weight_scale$"):
        SafetensorsFolder(folder, rows).read(piece)
    blocks = from_json({"quantization_config": FORMATS["compressed blocks"]})
    (tmp_path / "other").mkdir()
    other = write(tmp_path / "other", FORMATS["compressed rows"])
    with pytest.raises(LoadError, match=r"q_proj\.weight_scale has shape \[192, 1\], which scales no matrix of 192 × 160"):
        SafetensorsFolder(other.folder, blocks).read(piece)


def test_an_input_scale_for_each_row_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, FORMATS["matrices"], {"model.layers.0.self_attn.q_proj.input_scale": torch.ones(192)}).folder
    with pytest.raises(LoadError, match=r"q_proj\.input_scale has shape \[192\]; a tensor of one element is supported"):
        load(model=str(folder), **SIZES)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e5m2])
def test_numbers_that_need_scales_are_refused_where_config_json_tells_none(tmp_path: Path, dtype: torch.dtype) -> None:
    names = {"model.layers.0.self_attn.q_proj.weight": (192, 160), "model.layers.1.input_layernorm.weight": (160,)}
    checkpoint = write(tmp_path, FORMATS["blocks"])
    for name, shape in names.items():
        tensors = load_file(checkpoint.plain / "model.safetensors") | {name: torch.ones(shape).to(dtype)}
        other = tmp_path / name
        other.mkdir()
        for file in ("config.json", "tokenizer.json"):
            (other / file).write_bytes((checkpoint.plain / file).read_bytes())
        save_file(tensors, other / "model.safetensors")
        with pytest.raises(
            LoadError, match=rf"{re.escape(name)} is stored as [IUF]\d+\w*, which is not supported; F64, F32, F16, BF16 are"
        ):
            load(model=str(other), **SIZES)


@pytest.mark.parametrize(
    ("capability", "version", "cuda", "rows", "groups"),
    [
        ((8, 0), "2.13.0+cu130", "13.0", False, False),
        ((8, 9), "2.11.0+cu130", "13.0", False, False),
        ((8, 9), "2.12.0+cu130", "13.0", True, False),
        ((9, 0), "2.11.0+cu128", "12.8", True, False),
        ((9, 0), "2.11.0+cu130", "13.0", True, True),
        ((10, 0), "2.14.1a0+git1", "13.2", True, False),
    ],
)
def test_a_card_and_a_torch_say_what_is_multiplied_in_8_bits(
    capability: tuple[int, int], version: str, cuda: str, rows: bool, groups: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    weights = torch.randn(32, 256)
    card = torch.device("cuda")
    assert Fp8Linear.fits(Fp8(*round_rows(weights)), card) == rows
    assert Fp8Linear.fits(Fp8(*round_groups(weights)), card) == groups
    assert not Fp8Linear.fits(Fp8(*round_rows(weights[:31])), card)
