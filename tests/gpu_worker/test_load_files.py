"""Finding, understanding and refusing models; GGUF tensors; what names a model apart from another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from gpu_worker.cuda.weights import load_weights as kernel_weights
from gpu_worker.errors import LoadError
from gpu_worker.layers.linear import EightBitRows, FourBitLinear, PrepackedLinear
from gpu_worker.loading import config as configs
from gpu_worker.loading.generation import from_json as generation_from_json
from gpu_worker.loading.gguf import GgufFile
from gpu_worker.loading.model_files import fingerprint, open_model
from gpu_worker.loading.source import Piece, Shard
from gpu_worker.models.weights import CpuMaker, load_weights
from gpu_worker.settings import WorkerSettings
from protocol.tokenizer_files import packaged_model
from tests.gpu_worker.fp8_checkpoints import FORMATS, write
from tests.gpu_worker.model_driver import TINY, load, load_packaged, load_tiny

KINDS = {
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
    "q4_1": gguf.GGMLQuantizationType.Q4_1,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "f32": gguf.GGMLQuantizationType.F32,
}


def _open(model: Path | str = "", **settings: Any) -> Any:
    return open_model(WorkerSettings(run_dir=Path("unused"), model=str(model), **settings))


def _write_gguf(path: Path, arch: str = "qwen2", kind: str = "q4_1", **metadata: Any) -> np.ndarray:
    """A file of one layer; returns the values of its query matrix, [64, 32]."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(1)
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(48)])
    writer.add_eos_token_id(5)
    writer.add_eot_token_id(6)
    for name, value in metadata.items():
        writer.add_uint32(name.replace("__", "."), value)
    shapes = {"token_embd": (48, 32), "blk.0.attn_q": (64, 32), "blk.0.attn_k": (32, 32), "blk.0.attn_v": (32, 32)}
    shapes |= {"blk.0.attn_output": (32, 64), "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}
    for name, shape in shapes.items():
        values = random.standard_normal(shape).astype(np.float32)
        stored = gguf.quantize(values, KINDS[kind])
        writer.add_tensor(f"{name}.weight", stored, raw_dtype=KINDS[kind])
        if name == "blk.0.attn_q":
            q = gguf.dequantize(stored, KINDS[kind]).astype(np.float32)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return q


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_tensors_are_read_in_every_storage(tmp_path: Path, kind: str) -> None:
    q = _write_gguf(tmp_path / "m.gguf", kind=kind)
    file = GgufFile(tmp_path / "m.gguf")
    read = file.read(Piece("model.layers.0.self_attn.q_proj.weight", (16, 48), (0, 32)))
    assert np.array_equal(read.numpy(), q[16:48])
    assert file.config.tied_embeddings
    assert (file.config.vocab_size, file.config.head_dim, file.config.q_size) == (48, 16, 64)
    assert file.quantised == kind.startswith("q")


@pytest.mark.parametrize("kind", ["q4_0", "q4_1"])
def test_four_bit_pieces_hold_the_values_of_the_file(tmp_path: Path, kind: str) -> None:
    q = _write_gguf(tmp_path / "m.gguf", kind=kind)
    packed = GgufFile(tmp_path / "m.gguf").four_bit(Piece("model.layers.0.self_attn.q_proj.weight", (0, 64), (0, 32)))
    assert packed is not None
    values = (packed.q.float() - 8) * packed.scale.repeat_interleave(32, 1) + packed.zero.repeat_interleave(32, 1)
    assert torch.allclose(values, torch.from_numpy(q), atol=1e-5)


def test_the_interleaved_heads_of_llama_files_are_put_right(tmp_path: Path) -> None:
    stored = _write_gguf(tmp_path / "m.gguf", arch="llama", kind="f32")
    read = GgufFile(tmp_path / "m.gguf").read(Piece("model.layers.0.self_attn.q_proj.weight", (0, 64), (0, 32))).numpy()
    for head in range(4):
        mine, theirs = read[16 * head : 16 * head + 16], stored[16 * head : 16 * head + 16]
        assert np.array_equal(mine[:8], theirs[0::2])
        assert np.array_equal(mine[8:], theirs[1::2])


def test_a_gguf_names_its_end_tokens(tmp_path: Path) -> None:
    _write_gguf(tmp_path / "m.gguf")
    files = _open(tmp_path / "m.gguf")
    assert files.generation.eos == [5, 6]
    assert _open(tmp_path).header_hash == files.header_hash, "a folder with one GGUF file is that file"


@pytest.mark.parametrize("shape", [(960, 576), (576, 1536), (64, 32), (48, 96)])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 17])
def test_linears_give_a_row_the_same_bits_beside_any_others(shape: tuple[int, int], rows: int) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(shape, generator=generator)
    x = torch.randn(130, shape[1], generator=generator)
    q = torch.randint(0, 16, shape, dtype=torch.uint8, generator=generator)
    scale = torch.rand(shape[0], shape[1] // 32, generator=generator)
    packed = type("Packed", (), {"q": q, "scale": scale, "zero": scale * 0.3})
    bias = torch.randn(shape[0], generator=generator)
    for linear in (PrepackedLinear(weight, bias), FourBitLinear(packed, bias), EightBitRows(weight)):  # type: ignore[arg-type]
        assert torch.equal(linear(x[:rows]), linear(x)[:rows])


def test_packed_linears_are_off_by_the_rounding_of_their_formats() -> None:
    weight = torch.randn(64, 96)
    x = torch.randn(9, 96)
    eight = EightBitRows(weight)
    assert float((eight(x) - x @ weight.T).abs().max() / (x @ weight.T).abs().max()) < 0.02
    assert float((eight.lookup(torch.arange(64)) - weight).abs().max()) < float(weight.abs().max()) / 127
    q = torch.randint(0, 16, (64, 96), dtype=torch.uint8)
    packed = type("Packed", (), {"q": q, "scale": torch.rand(64, 3), "zero": torch.rand(64, 3)})
    exact = x @ ((q.float() - 8) * packed.scale.repeat_interleave(32, 1) + packed.zero.repeat_interleave(32, 1)).T
    assert float((FourBitLinear(packed, None)(x) - exact).abs().max() / exact.abs().max()) < 0.02  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM is not supported; supported are the Llama"),
        ({"architectures": None}, "none named"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq quantised weights are not supported; supported are"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4}}, "'longrope' is not supported; supported are linear, llama3, yarn"),
        ({"hidden_act": "gelu"}, "'gelu' is not supported; silu is"),
        ({"mlp_bias": True}, "biases in the MLP"),
        ({"num_attention_heads": 5}, "5 attention heads are no multiple of 2"),
        ({"rms_norm_eps": None}, "config.json"),
    ],
)
def test_what_is_not_supported_is_refused_in_one_line_that_says_what_is(change: dict[str, Any], says: str) -> None:
    with pytest.raises(LoadError) as refusal:
        configs.from_json({**TINY, **change})
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_missing_field_is_named() -> None:
    with pytest.raises(LoadError, match=r"config\.json lacks 'hidden_size'"):
        configs.from_json({k: v for k, v in TINY.items() if k != "hidden_size"})


def test_a_window_of_some_layers_that_is_shorter_than_the_context_is_refused_with_what_helps() -> None:
    config = configs.from_json({**TINY, "architectures": ["Qwen2ForCausalLM"], "sliding_window": 128, "use_sliding_window": True})
    config.check_length(128)
    with pytest.raises(LoadError, match="--max-model-len 128"):
        config.check_length(129)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"intermediate_size": 256}, r"mlp\.gate_proj\.weight has shape \[272, 160\]"),
        ({"num_key_value_heads": 1}, r"self_attn\.k_proj\.weight has shape \[64, 160\]"),
        ({"num_attention_heads": 4}, r"self_attn\.q_proj\.weight has shape \[192, 160\]"),
        ({"head_dim": 16}, r"self_attn\.q_proj\.weight has shape \[192, 160\]"),
        ({"head_dim": None}, r"self_attn\.q_proj\.weight has shape \[192, 160\]"),
        ({"hidden_size": 128}, r"embed_tokens\.weight has shape \[300, 160\]"),
        ({"vocab_size": 301}, r"embed_tokens\.weight has shape \[300, 160\]"),
        ({"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 16}, r"q_norm\.weight has shape \[32\]; .* \[16\]"),
        ({"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 64}, r"q_norm\.weight has shape \[32\]; .* \[64\]"),
    ],
)
def test_tensors_of_other_sizes_than_config_json_says_are_refused_not_cut(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    folder = write(tmp_path, FORMATS["blocks"]).plain
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **change}))
    files = _open(folder)
    cpu = torch.device("cpu")
    with pytest.raises(LoadError, match=says):
        load_weights(files.config, files.tensors(cpu, torch.float32), CpuMaker(False))
    with pytest.raises(LoadError, match=says):
        kernel_weights(files.tensors(cpu, torch.float32), files.config, cpu, torch.float32, Shard())


def test_rows_beyond_the_vocabulary_are_left_out(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, FORMATS["blocks"])
    raw = json.loads((checkpoint.plain / "config.json").read_text())
    (checkpoint.plain / "config.json").write_text(json.dumps({**raw, "vocab_size": 280}))
    files = _open(checkpoint.plain)
    weights = load_weights(files.config, files.tensors(torch.device("cpu"), torch.float32), CpuMaker(False))
    assert weights.head.out_features == 280
    assert torch.equal(weights.embedding.lookup(torch.arange(280)), checkpoint.values["model.embed_tokens.weight"][:280])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"qwen2__feed_forward_length": 32}, r"blk\.0\.ffn_gate\.weight is 64 × 32"),
        ({"qwen2__attention__head_count_kv": 1}, r"blk\.0\.attn_k\.weight is 32 × 32"),
        ({"qwen2__attention__key_length": 8}, r"blk\.0\.attn_q\.weight is 64 × 32"),
    ],
)
def test_gguf_tensors_of_other_sizes_than_the_metadata_says_are_refused(tmp_path: Path, change: dict[str, int], says: str) -> None:
    _write_gguf(tmp_path / "m.gguf", **change)
    file = GgufFile(tmp_path / "m.gguf")
    with pytest.raises(LoadError, match=says):
        load_weights(file.config, file, CpuMaker(False))


def test_a_head_s_size_that_is_not_told_is_that_of_transformers() -> None:
    without = {k: v for k, v in TINY.items() if k != "head_dim"}
    assert configs.from_json(without).head_dim == 128
    assert configs.from_json({**without, "architectures": ["LlamaForCausalLM"]}).head_dim == 96 // 6


@pytest.mark.parametrize(
    ("model", "says"),
    [("/nowhere/model", "there is no /nowhere/model"), ("missing.gguf", "there is no missing.gguf")],
)
def test_a_model_that_is_not_there_is_named(model: str, says: str) -> None:
    with pytest.raises(LoadError, match=says):
        _open(model)


def test_damaged_and_incomplete_files_are_load_errors(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(LoadError, match=r"bad\.gguf"):
        _open(tmp_path / "bad.gguf")
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(LoadError, match=r"no config\.json"):
        _open(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(LoadError, match="not readable JSON"):
        _open(folder)
    (folder / "config.json").write_text(json.dumps(TINY))
    with pytest.raises(LoadError, match="no tokenizer"):
        _open(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(LoadError, match="no \\*\\.safetensors"):
        _open(folder)
    (folder / "model.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(LoadError, match="cannot read the weights"):
        _open(folder)


def test_eos_and_defaults_come_from_the_generation_config_then_config_then_tokenizer() -> None:
    tokenizer = {"eos_token": {"content": "</s>"}, "added_tokens": [{"id": 2, "content": "</s>"}]}
    first = generation_from_json({"eos_token_id": [9, 8], "temperature": 0.6, "top_k": 20}, {"eos_token_id": 7}, tokenizer)
    assert (first.eos, first.defaults.temperature, first.defaults.top_k) == ([9, 8], 0.6, 20)
    assert generation_from_json({}, {"eos_token_id": 7, "bos_token_id": 1}, tokenizer).eos == [7]
    assert generation_from_json({}, {}, tokenizer).eos == [2]
    assert generation_from_json({}, {}, {}).bos == -1


def test_fingerprints_tell_models_storage_and_seeds_apart(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    one, two = (_open(tmp_path, load_format="dummy", seed=seed) for seed in (0, 1))
    prints = {fingerprint(one, "float32", packed, kv, 0) for packed in (True, False) for kv in ("float32", "bfloat16")}
    prints.add(fingerprint(two, "float32", True, "float32", 0))
    prints.add(fingerprint(one, "float32", True, "float32", 3))
    assert len(prints) == 6
    assert {len(p) for p in prints} == {16}
    assert fingerprint(_open(tmp_path, load_format="dummy"), "float32", True, "float32", 0) in prints


def test_settings_that_cannot_be_met_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="max_model_len 1000 is more than the 512"):
        load_tiny(tmp_path, max_model_len=1000)
    with pytest.raises(LoadError, match="3 blocks of 16 tokens hold no sequence of 256 tokens, which needs 16"):
        load_tiny(tmp_path, num_gpu_blocks=3)
    with pytest.raises(LoadError, match="dtype bfloat16 is not supported on the CPU"):
        load_tiny(tmp_path, dtype="bfloat16")
    if not torch.cuda.is_available():
        with pytest.raises(LoadError, match="no usable GPU"):
            load_tiny(tmp_path, device="cuda")


def test_a_tiny_model_announces_what_it_is(tmp_path: Path) -> None:
    d = load_tiny(tmp_path, served_model_name="tiny").description
    assert (d.model, d.eos, d.attention) == ("tiny", [7, 8], "torch")
    assert (d.geometry.blocks, d.geometry.slots, d.geometry.max_model_len, d.geometry.vocab_size) == (60, 8, 256, 1003)
    assert len(d.fingerprint) == len(d.tokenizer) == 16


@pytest.mark.slow
@pytest.mark.model
def test_the_packaged_model_is_the_default_and_has_its_name() -> None:
    assert packaged_model() is not None
    d = load_packaged("auto").description
    assert (d.model, d.eos, d.geometry.max_model_len) == ("SmolLM2-135M-Instruct", [2], 4096)
    assert d.fingerprint != load(dtype="float32", num_gpu_blocks=300).description.fingerprint
