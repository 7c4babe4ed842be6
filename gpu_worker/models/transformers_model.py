"""A decoder of transformers over our paged attention: its code and weights, no cache, no mask, one row of packed tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gpu_worker.attention.interface import Attention, CacheShape, Rows, new_cache
from gpu_worker.attention.torch_backend import TorchAttention
from gpu_worker.attention.transformers_interface import KEYWORD, NAME, Call, register
from gpu_worker.errors import LoadError
from gpu_worker.layers.linear import PrepackedLinear
from gpu_worker.loading.transformers_config import TransformersConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}  # of logits, relative


class TransformersModel:
    """A Decoder (see gpu_worker.models.decoder). The trunk computes hidden states; what is left of the model, logits."""

    def __init__(self, config: TransformersConfig, model: PreTrainedModel) -> None:
        """model: with NAME as its attention; it is taken apart."""
        self._config = config
        decoder = model.get_decoder()
        # OPT calls the decoder inside its base; ModernBERT has an output layer of that name
        self._trunk = decoder if hasattr(decoder, "config") else model.base_model
        self._given = _Given()
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if child is self._trunk:
                    setattr(parent, name, self._given)
        self._head = model

    def forward(
        self, ids: torch.Tensor, positions: torch.Tensor, last: torch.Tensor, attention: Attention, begun: Callable[[], None]
    ) -> torch.Tensor:
        config = self._config

        def paged(call: Call) -> torch.Tensor:
            begun()
            kv = torch.cat((call.key, call.value), dim=1)
            out = attention.attend(call.module.layer_idx, call.query[0].transpose(0, 1), kv[0].transpose(0, 1))  # type: ignore[arg-type]
            return out.to(call.value.dtype).view(1, len(ids), config.heads, config.head_dim)

        output = self._trunk(input_ids=ids[None], position_ids=positions[None], use_cache=False, **{KEYWORD: paged})
        self._given.kind = type(output)
        hidden: torch.Tensor = output.last_hidden_state[0, last]
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        if not len(hidden):
            return hidden.new_zeros(0, self._config.vocab_size, dtype=torch.float32)
        self._given.hidden = hidden[None]
        output = self._head(input_ids=torch.zeros((1, len(hidden)), dtype=torch.long, device=hidden.device), use_cache=False)
        logits: torch.Tensor = output.logits[0].float()
        return logits


class _Given(torch.nn.Module):
    """Stands where the trunk stood, so that a model computes logits, in its own way, of hidden states that are known already."""

    def __init__(self) -> None:
        super().__init__()
        self.kind: Callable[..., Any] | None = None  # the class of the trunk's output
        self.hidden: torch.Tensor | None = None  # [1, n, hidden]

    def forward(self, *args: object, **kwargs: object) -> Any:
        assert self.kind is not None, "logits of hidden states that were not computed"
        return self.kind(last_hidden_state=self.hidden)


def load_transformers(
    config: TransformersConfig, folder: Path, device: torch.device, dtype: torch.dtype, dummy_seed: int | None = None
) -> TransformersModel:
    """Read a folder's safetensors, or make random weights from a seed. Raises LoadError, one line.

    Before anything is served, what it computes is compared with what transformers computes alone.
    """
    register()
    if dummy_seed is None:
        model = _read(config, folder, device, dtype)
    else:
        model = _random(config, dummy_seed, device, dtype)
    model.eval().requires_grad_(False)
    try:
        return _compared(config, model, device, dtype)
    except LoadError:
        raise
    except Exception as error:  # each model's code raises whatever comes to hand
        raise LoadError(f"architecture {config.architecture} is not supported: {type(error).__name__}: {_one_line(error)}") from error


def _read(config: TransformersConfig, folder: Path, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    if (folder / "adapter_config.json").exists():
        raise LoadError(f"{folder} holds an adapter (adapter_config.json), which is not supported")
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config.for_transformers(),
            dtype=dtype,
            device_map={"": device} if device.type != "cpu" else None,
            attn_implementation="eager",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are named below
            output_loading_info=True,
        )
    except Exception as error:
        raise LoadError(f"cannot read the weights in {folder}: {_one_line(error)}") from error
    for what in ("missing_keys", "mismatched_keys", "error_msgs"):
        found = sorted(str(key if isinstance(key, str) else key[0]) for key in info.get(what) or ())
        if found:
            raise LoadError(f"{folder}: {what.replace('_', ' ')} among the weights: {', '.join(found[:3])}{', …' * (len(found) > 3)}")
    return model


def _random(config: TransformersConfig, seed: int, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """As transformers begins a training, made on the device."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config.for_transformers(), attn_implementation="eager", dtype=dtype)


def _compared(config: TransformersConfig, model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> TransformersModel:
    """The model over our attention, if two short sequences, packed and in two steps, come out as from transformers' own attention.

    This finds what no configuration tells: positions that are counted otherwise, layers that mix neighbouring tokens.
    """
    sequences = [torch.arange(3, 3 + 7 * n, 7, device=device) % config.vocab_size for n in (9, 6)]
    expected = [model(input_ids=ids[None], use_cache=False).logits[0].float() for ids in sequences]
    model.set_attn_implementation(NAME)
    if device.type == "cpu" and dtype == torch.float32:
        _prepack(model)
    made = TransformersModel(config, model)
    shape = CacheShape(config.layers, 4, config.kv_heads, 8, config.head_dim)
    attention = TorchAttention(new_cache(shape, device, dtype), shape, config.heads, config.scoring)
    tables = np.array([[3, 0], [1, 2]], np.int32)
    for cut in ([(0, 5), (0, 4)], [(5, 9), (4, 6)]):
        starts, stops = (np.array(column, np.int32) for column in zip(*cut))
        attention.begin(Rows(starts, stops - starts, tables, np.zeros(2, bool)))
        ids = torch.cat([s[start:stop] for s, (start, stop) in zip(sequences, cut)])
        positions = torch.cat([torch.arange(*span, device=device) for span in cut])
        logits = made.logits(made.forward(ids, positions, torch.arange(len(ids), device=device), attention, lambda: None))
        for got, want, (start, stop) in zip(torch.split(logits, (stops - starts).tolist()), expected, cut):
            _check_close(config, got, want[start:stop], dtype)
    return made


def _check_close(config: TransformersConfig, got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    """In float32 every token's; with half precision a mixture's router may choose otherwise now and then, so the median token's."""
    spread = (want - want.mean(dim=1, keepdim=True)).norm(dim=1)
    errors = (got - want).norm(dim=1) / spread.clamp(min=1e-6)
    error = float(errors.max() if dtype == torch.float32 else errors.median())
    if not error <= _TOLERANCE[dtype]:  # nor is NaN
        how = f"over paged attention its logits are {error:.2g} off those of transformers"
        raise LoadError(f"architecture {config.architecture} is not supported: {how}")


def _prepack(model: PreTrainedModel) -> None:
    """Put every linear into the layout in which a row's result does not depend on the rows beside it (see layers/linear.py)."""
    from transformers.pytorch_utils import Conv1D

    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is torch.nn.Linear:
                setattr(module, name, _Prepacked(child.weight, child.bias))
            elif isinstance(child, Conv1D):
                setattr(module, name, _Prepacked(child.weight.t().contiguous(), child.bias))


class _Prepacked(torch.nn.Module):
    """A linear layer. weight: [out, in]."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self._linear = PrepackedLinear(weight.detach(), None if bias is None else bias.detach())
        self.weight = self._linear.weight  # for models that ask for its dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._linear(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
