"""The planner against figures computed by hand, and its command as a user types it."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from pagewire.plan import ModelSizes, PlanError, Setup, estimate_memory, largest_batch, largest_context, longest_served, read_sizes, room
from pagewire.plan.command import main
from protocol.gguf_header import GgufError, read_tensors
from protocol.tokenizer_files import packaged_model

SHAPES = Path(__file__).parents[1] / "data" / "shapes"
LLAMA, QWEN = SHAPES / "llama-3.1-8b", SHAPES / "qwen3-0.6b"
GIB = 1 << 30
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def tiny(folder: Path, **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(TINY | changes))
    return folder


def a_string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def a_gguf(path: Path, kinds: dict[str, int], tied: bool = True) -> Path:
    """The header of a GGUF file with TINY's sizes. kinds: GGML's format by the tensor's part, 3 (Q4_1) by default."""
    keys: dict[str, int | str | float] = {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.context_length": 512,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    values = {
        int: lambda v: struct.pack("<II", 4, v),
        str: lambda v: struct.pack("<I", 8) + a_string(v),
        float: lambda v: struct.pack("<If", 6, v),
    }
    body = b"".join(a_string(key) + values[type(value)](value) for key, value in keys.items())
    layer = {"attn_q": (64, 64), "attn_k": (64, 32), "attn_v": (64, 32), "attn_output": (64, 64)}
    layer |= {"ffn_gate": (64, 96), "ffn_up": (64, 96), "ffn_down": (96, 64)}
    tensors = {"token_embd.weight": (64, 100), "output_norm.weight": (64,)} | ({} if tied else {"output.weight": (64, 100)})
    tensors |= {f"blk.{i}.{name}.weight": shape for i in range(2) for name, shape in layer.items()}
    for name, shape in tensors.items():
        part = name.split(".")[-2]
        kind = kinds.get(part, 0 if part.endswith("norm") else 3)
        body += a_string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape) + struct.pack("<IQ", kind, 0)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + body)
    return path


# ---------------------------------------------------------------- memory


def test_the_8b_shape_has_the_parameters_that_its_makers_state() -> None:
    memory = estimate_memory(LLAMA)
    assert memory.parameters == 8_030_261_248
    assert memory.weights == 2 * 8_030_261_248
    assert memory.parts["embedding"] == memory.parts["output"] == 2 * 128256 * 4096
    assert memory.parts["attention"] == 2 * 32 * (6144 * 4096 + 4096 * 4096)
    assert memory.parts["mlp"] == 2 * 32 * 3 * 14336 * 4096
    assert memory.kv_per_token == 2 * 32 * 8 * 128 * 2
    assert memory.kv_per_block == 16 * 131072


def test_the_small_shape_ties_its_output_to_the_embedding_and_norms_its_heads() -> None:
    memory = estimate_memory(QWEN)
    assert memory.parameters == 596_049_920
    assert memory.weights == 2 * 596_049_920
    assert "output" not in memory.parts
    assert memory.parts["norms and biases"] == 2 * (28 * (2 * 1024 + 2 * 128) + 1024)
    assert memory.kv_per_token == 2 * 28 * 8 * 128 * 2


def test_buffers_hold_the_largest_step_and_the_logits() -> None:
    memory = estimate_memory(QWEN, Setup(max_num_batched_tokens=1000, max_num_seqs=10, max_model_len=2048))
    width = 2 * 1024 + 2 * 2048 + 2 * 1024 + 3 * 3072  # in and normed, queries and attended, keys and values, gate, up and product
    scored = (5 * 10 + 22 * 256) * 151936  # a slice of a prompt's positions: more than what ten rows take that sample
    assert memory.activations == 2 * (1000 * width + 10 * 151936) + scored + 2048 * 128 * 4 + 4 * 10 * 128 + (32 << 20)


def test_float32_takes_twice_what_bfloat16_takes() -> None:
    half, full = (estimate_memory(QWEN, Setup(dtype=dtype)) for dtype in ("auto", "float32"))
    assert full.weights == 2 * half.weights
    assert full.kv_per_token == 2 * half.kv_per_token


def test_an_fp8_cache_takes_half_of_bfloat16_s_and_holds_twice_as_much() -> None:
    plain, fp8 = (room(QWEN, 40 * GIB, Setup(kv_cache_dtype=kind)) for kind in ("auto", "fp8"))
    assert fp8.memory.kv_per_block * 2 == plain.memory.kv_per_block == 16 * 2 * 28 * 1024 * 2
    assert (fp8.memory.weights, fp8.memory.activations) == (plain.memory.weights, plain.memory.activations)
    assert 2 * plain.blocks <= fp8.blocks <= 2 * plain.blocks + 2
    assert fp8.settings["kv_cache_dtype"] == "fp8"
    assert "kv_cache_dtype" not in plain.settings
    assert estimate_memory(QWEN, Setup(device="cpu", kv_cache_dtype="fp8")).kv_per_token == 2 * 28 * 1024


def test_fp8_weights_are_a_byte_each_and_four_for_a_scale(tmp_path: Path) -> None:
    qkv, mlp = 128 * 64, 96 * 64
    blocks = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    for how, scale in (({}, 1), ({"quantization_config": blocks}, 1)):  # rows of 64 and 96 are one group
        model = tiny(tmp_path, **how)
        parts = estimate_memory(model, Setup(quantization="fp8")).parts
        assert parts["attention"] == 2 * (qkv + 64 * 64 + 4 * scale * (128 + 64))
        assert parts["mlp"] == 2 * (3 * mlp + 4 * scale * (192 + 64))
        assert parts["embedding"] == 100 * 64 * 2
    wide = tiny(tmp_path, hidden_size=256, quantization_config=blocks | {"modules_to_not_convert": ["model.layers.0.mlp.up_proj"]})
    parts = estimate_memory(wide).parts
    gate_up, down = 2 * 96 * 256, 256 * 96
    assert parts["mlp"] == (2 * gate_up + down + 4 * 256) + (gate_up + 4 * 2 * 192 + down + 4 * 256)
    assert estimate_memory(wide, Setup(device="cpu")).parts["mlp"] == 2 * 4 * (gate_up + down)


def test_only_what_a_card_multiplies_in_fp8_is_planned_in_fp8(tmp_path: Path) -> None:
    """As `Fp8Linear.fits` and the worker's weights have it: bfloat16 activations, rows and columns in 16s, groups of 128 whole."""
    folder = tiny(tmp_path)
    for dtype in ("float16", "float32"):
        plain, fp8 = (estimate_memory(folder, Setup(dtype=dtype, quantization=kind)) for kind in ("auto", "fp8"))
        assert (fp8.weights, fp8.activations) == (plain.weights, plain.activations)
        assert "no weights are kept in fp8" in " ".join(room(folder, GIB * 8, Setup(dtype=dtype, quantization="fp8")).notes)
    assert "fp8" not in " ".join(room(folder, GIB * 8, Setup(quantization="fp8")).notes)
    parts = estimate_memory(tiny(tmp_path, intermediate_size=104), Setup(quantization="fp8")).parts
    gate_up, down = 2 * 104 * 64, 64 * 104
    assert parts["mlp"] == 2 * (gate_up + 4 * 2 * 104 + 2 * down)  # 104 columns are no multiple of 16, 208 rows are
    blocks = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    parts = estimate_memory(tiny(tmp_path, intermediate_size=336, quantization_config=blocks)).parts
    assert parts["mlp"] == 2 * (2 * 336 * 64 + 4 * 2 * 336 + 2 * 64 * 336)  # 336 columns are two groups of 128 and a part of one


def test_what_fp8_rounds_activations_into_is_as_wide_as_the_widest_that_it_multiplies(tmp_path: Path) -> None:
    setup = Setup(quantization="fp8")
    for intermediate, widest in ((96, 96), (104, 64)):
        model = tiny(tmp_path, intermediate_size=intermediate)
        more = estimate_memory(model, setup).activations - estimate_memory(model).activations
        assert more == setup.step_tokens * (widest + 4)


def test_fp8_for_weights_that_have_fewer_bits_is_refused_as_by_the_worker(tmp_path: Path) -> None:
    path = a_gguf(tmp_path / "m.gguf", {})
    for device in ("cuda", "cpu"):
        with pytest.raises(PlanError, match="quantization: fp8 rounds weights of 16 or 32 bits; those of m have fewer"):
            estimate_memory(path, Setup(device=device, quantization="fp8"))
    result = CliRunner().invoke(main, ["--model", str(path), "--quantization", "fp8"])
    assert (result.exit_code, "Traceback" in result.output) == (2, False)


def test_biases_and_an_output_of_its_own_are_counted(tmp_path: Path) -> None:
    plain = estimate_memory(tiny(tmp_path)).parameters
    assert plain == 100 * 64 + 2 * (128 * 64 + 64 * 64 + 3 * 96 * 64 + 128) + 64
    qwen = tiny(tmp_path, architectures=["Qwen2ForCausalLM"], tie_word_embeddings=False)
    assert estimate_memory(qwen).parameters == plain + 2 * 128 + 100 * 64


def test_a_file_of_4_bits_stays_packed_on_the_cpu(tmp_path: Path) -> None:
    path = a_gguf(tmp_path / "m.gguf", {"token_embd": 8})
    parts = estimate_memory(path, Setup(device="cpu")).parts
    assert parts["embedding"] == 100 * (64 + 2)  # int8 and a 16-bit scale a row
    assert parts["attention"] == 2 * (128 * 64 + 64 * 64) * 5 // 8  # 4 bits, and 4 bytes for every 32 weights
    assert parts["mlp"] == 2 * 3 * 96 * 64 * 5 // 8
    assert "output" not in parts
    float32 = estimate_memory(path, Setup(device="cpu", dtype="float32")).parts
    assert float32["mlp"] == 2 * 3 * 96 * 64 * 4
    assert float32["embedding"] == float32["output"] == 100 * 64 * 4  # kept in two layouts though tied
    assert estimate_memory(path).weights == 2 * estimate_memory(path).parameters


def test_a_matrix_of_mixed_formats_is_unpacked(tmp_path: Path) -> None:
    parts = estimate_memory(
        a_gguf(tmp_path / "m.gguf", {"attn_k": 14, "token_embd": 8, "output": 8}, tied=False), Setup(device="cpu")
    ).parts
    assert parts["attention"] == 2 * (128 * 64 * 4 + 64 * 64 * 5 // 8)
    assert parts["output"] == 100 * (64 + 2)


def test_a_gguf_of_16_bits_is_not_taken_for_quantised(tmp_path: Path) -> None:
    every = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "token_embd"), 1)
    path = a_gguf(tmp_path / "m.gguf", every)
    assert not read_sizes(path).quantised
    assert estimate_memory(path, Setup(device="cpu")).parts["mlp"] == 2 * 3 * 96 * 64 * 4


@pytest.mark.model
def test_the_packaged_model_is_planned_for_by_default() -> None:
    assert packaged_model() is not None
    memory = estimate_memory("", Setup(device="cpu"))
    assert memory.parameters == 134_515_008
    assert memory.kv_per_token == 2 * 30 * 3 * 64 * 4
    matrices = 30 * (960 * 576 + 576 * 576 + 3 * 1536 * 576)
    assert memory.weights == matrices * 5 // 8 + 49152 * (576 + 2) + 4 * (30 * 2 * 576 + 576)


# ---------------------------------------------------------------- what fits


def test_blocks_are_what_is_left_under_the_utilisation() -> None:
    found = room(LLAMA, 80 * GIB)
    memory = found.memory
    assert found.limit == int(80 * GIB * 0.9)
    assert memory.total(found.blocks) + memory.overhead <= found.limit
    assert memory.total(found.blocks + 1) + memory.overhead > found.limit
    assert found.tokens == 16 * found.blocks
    assert not found.notes


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.sampled_from([LLAMA, QWEN]), st.integers(1, 32768), st.integers(17, 140), st.sampled_from([1, 16, 256]))
def test_the_largest_batch_fits_and_one_more_does_not(model: Path, context: int, gib: int, block_size: int) -> None:
    def fits(batch: int) -> bool:
        setup = Setup(block_size=block_size, max_num_seqs=batch, max_model_len=context)
        return room(sizes, gib * GIB, setup).blocks >= batch * -(-context // block_size)

    sizes = read_sizes(model)
    batch = largest_batch(sizes, context, gib * GIB, Setup(block_size=block_size))
    assert batch == 0 or fits(batch)
    assert batch == 1024 or not fits(batch + 1)
    if batch:
        assert largest_context(sizes, batch, gib * GIB, Setup(block_size=block_size)) >= context


def test_a_model_larger_than_the_device_leaves_no_room_and_says_so() -> None:
    found = room(LLAMA, 12 * GIB)
    assert found.blocks == largest_batch(LLAMA, 1, 12 * GIB) == largest_context(LLAMA, 1, 12 * GIB) == 0
    assert found.settings == {}
    assert "does not fit" in " ".join(found.notes)


def test_a_long_context_that_does_not_fit_is_lowered_in_the_recommendation() -> None:
    found = room(LLAMA, 24 * GIB, Setup(max_model_len=131072))
    assert found.blocks * 16 < 131072
    assert found.settings["max_model_len"] == largest_context(LLAMA, 1, 24 * GIB)
    assert "does not start" in found.notes[0]


def test_the_recommended_settings_fit(tmp_path: Path) -> None:
    for gib, model in ((24, LLAMA), (80, LLAMA), (16, QWEN)):
        suited = room(model, gib * GIB).settings
        setup = Setup(**suited)  # type: ignore[arg-type]
        found = room(model, gib * GIB, setup)
        assert found.tokens >= setup.max_model_len
        assert found.tokens >= setup.max_num_seqs * setup.max_model_len // 2


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("field", "value"),
    [("device", "tpu"), ("dtype", "int3"), ("block_size", 0), ("max_num_seqs", 0), ("max_num_batched_tokens", -1), ("max_model_len", -1)]
    + [("gpu_memory_utilization", value) for value in (0.0, 1.1)],
)
def test_a_setup_that_no_worker_takes_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(PlanError, match=field):
        Setup(**{field: value})


def test_lengths_beyond_the_model_are_refused(tmp_path: Path) -> None:
    sizes = read_sizes(tiny(tmp_path))
    for call in (lambda: largest_batch(sizes, 513, GIB), lambda: largest_batch(sizes, 0, GIB), lambda: largest_context(sizes, 0, GIB)):
        with pytest.raises(PlanError):
            call()
    with pytest.raises(PlanError, match="512"):
        estimate_memory(sizes, Setup(max_model_len=513))
    with pytest.raises(PlanError, match="CPU"):
        Setup(device="cpu", dtype="bfloat16")


QWEN_WITH_A_WINDOW = {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 200}


def test_nothing_is_planned_for_a_length_that_the_worker_refuses(tmp_path: Path) -> None:
    folder = tiny(tmp_path, **QWEN_WITH_A_WINDOW)
    for setup in (Setup(), Setup(max_model_len=201)):
        with pytest.raises(PlanError, match=r"sliding-window .* serve it with --max-model-len 200"):
            room(folder, GIB * 8, setup)
    found = room(folder, GIB * 8, Setup(max_model_len=200))
    assert found.settings["max_model_len"] == found.context == longest_served(folder) == largest_context(folder, 1, GIB * 8) == 200
    with pytest.raises(PlanError, match="context: 201 is not between 1 and the 200 tokens"):
        largest_batch(folder, 201, GIB * 8)
    assert longest_served(tiny(tmp_path)) == 512


def test_the_tables_end_where_the_model_is_served_no_further(tmp_path: Path) -> None:
    folder = tiny(tmp_path, **QWEN_WITH_A_WINDOW | {"sliding_window": 5000, "max_position_embeddings": 131072})
    said = json.loads(CliRunner().invoke(main, ["--model", str(folder), "--json"]).output)
    assert list(said["largest_batch"]) == ["1024", "4096"]
    assert said["largest_context"]["1"] == 5000
    assert "5,000 tokens  (the model's limit)" in CliRunner().invoke(main, ["--model", str(folder)]).output


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="neither"):
        read_sizes(tmp_path / "missing")
    with pytest.raises(PlanError, match=r"config\.json"):
        read_sizes(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(PlanError, match=r"config\.json"):
        read_sizes(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(PlanError, match="version 0"):
        read_sizes(tmp_path / "x.gguf")
    with pytest.raises(PlanError, match="MixtralForCausalLM"):
        read_sizes(tiny(tmp_path, architectures=["MixtralForCausalLM"]))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2000), st.integers(0, 255))
def test_a_damaged_gguf_never_raises_anything_else(tmp_path_factory: pytest.TempPathFactory, at: int, byte: int) -> None:
    path = a_gguf(tmp_path_factory.mktemp("damaged") / "m.gguf", {})
    data = bytearray(path.read_bytes())
    data[at % len(data)] = byte
    path.write_bytes(data[: max(24, len(data) - at % 7)])
    try:
        assert isinstance(read_sizes(path), ModelSizes)
        read_tensors(path)
    except (PlanError, GgufError):
        pass


# ---------------------------------------------------------------- the command


def test_the_table_names_everything_a_user_sizes_by() -> None:
    result = CliRunner().invoke(main, ["--model", str(LLAMA)])
    assert result.exit_code == 0, result.output
    for words in ("8,030,261,248", "14.96 GiB", "128 KiB", "largest batch", "largest context", "--max-num-seqs", "27,728"):
        assert words in result.output


@pytest.mark.parametrize("option", ["--batch", "--max-num-seqs"])
def test_more_sequences_than_a_worker_holds_are_refused(option: str) -> None:
    assert CliRunner().invoke(main, ["--model", str(QWEN), option, "1024"]).exit_code == 0
    refused = CliRunner().invoke(main, ["--model", str(QWEN), option, "1025"])
    assert refused.exit_code == 2
    assert option in refused.output


def test_json_has_the_same_figures() -> None:
    arguments = ["--model", str(QWEN), "--gpu-memory", "24GB", "--max-num-seqs", "64", "--context", "2048", "--batch", "8", "--json"]
    said = json.loads(CliRunner().invoke(main, arguments).output)
    setup = Setup(max_num_seqs=64)
    found = room(QWEN, 24 * 10**9, setup)
    assert said["blocks"] == found.blocks
    assert said["largest_batch"] == {"2048": largest_batch(QWEN, 2048, 24 * 10**9, setup)}
    assert said["largest_context"] == {"8": largest_context(QWEN, 8, 24 * 10**9, setup)}
    assert said["recommended"] == found.settings


@pytest.mark.parametrize(
    "arguments",
    [["--gpu-memory", "80 apples"], ["--gpu-memory", "0"], ["--gpu-memory", "80"], ["--model", "/nowhere"], ["--block-size", "0"]],
)
def test_a_mistake_gets_one_line_and_code_2(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, ["--model", str(QWEN), *arguments])
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_no_torch_is_imported() -> None:
    script = f"import sys; from pagewire.plan import room; room({str(QWEN)!r}, 1 << 36); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0


# ---------------------------------------------------------------- decoders of transformers


GPT2 = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}  # transformers' defaults are those of the smallest


def test_a_decoder_of_transformers_is_sized_by_its_code(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(GPT2))
    on_card, on_cpu = (estimate_memory(tmp_path, Setup(device=device)) for device in ("cuda", "cpu"))
    assert on_card.parameters == 124_439_808
    assert (on_card.weights, on_cpu.weights) == (2 * 124_439_808, 4 * (124_439_808 + 50257 * 768))
    assert (on_card.kv_per_token, on_cpu.kv_per_token) == (2 * 12 * 768 * 2, 2 * 12 * 768 * 4)
    assert room(tmp_path, 8 * GIB, Setup(device="cpu")).context == 1024
    assert on_cpu.overhead == estimate_memory(QWEN, Setup(device="cpu")).overhead + (110 << 20)  # libraries


def test_longrope_is_planned_for_up_to_the_length_at_which_it_turns_otherwise(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    sizes = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    lengths = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "pad_token_id": 0}
    phi = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "rope_parameters": rope} | sizes | lengths
    (tmp_path / "config.json").write_text(json.dumps(phi))
    assert longest_served(tmp_path) == largest_context(tmp_path, 1, 80 * GIB) == room(tmp_path, 80 * GIB).settings["max_model_len"] == 4096
    with pytest.raises(PlanError, match=r"rope_type 'longrope'.*--max-model-len 4096"):
        room(tmp_path, 80 * GIB, Setup(max_model_len=131072))


def test_what_is_not_served_is_not_planned_for(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}))
    with pytest.raises(PlanError, match="MambaForCausalLM is not supported"):
        read_sizes(tmp_path)
