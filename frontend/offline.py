"""What the offline API takes and gives: sampling parameters, prompts, outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import msgspec

from frontend.api import chat, completions
from frontend.api.answers import ranked
from frontend.client import Model
from frontend.entries import Choice, Entry, NewRequest, TokenLogprobs
from frontend.errors import ApiError
from frontend.prompts import Prompt, parts
from frontend.sampling import check_text, room
from frontend.validation import ChatBody, CompletionBody, check_chat, check_completion, parse
from protocol.columns import unpack

CHAT_OPTIONS = frozenset(("add_generation_prompt", "continue_final_message", "chat_template_kwargs"))


class SamplingParams(msgspec.Struct, kw_only=True, frozen=True):
    """How outputs are sampled; names and meaning are those of the HTTP API. None: the model's own default.

    Raises ValueError, naming the field, once they are used.
    """

    n: int = 1
    best_of: int | None = None
    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    priority: int = 0
    cache_salt: str | None = None


@dataclass
class CompletionOutput:
    """One output of a request. `logprobs` holds one entry a token if they were asked for."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None  # "stop", "length"; None while it goes on
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass
class RequestOutput:
    """A request and all its outputs so far."""

    request_id: str
    outputs: list[CompletionOutput]
    finished: bool
    cached_tokens: int = 0
    prompt: str | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # of each prompt token, None of the first; None until complete
    prompt_token_ids: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Prepared:
    """A request that can be submitted, and what its outputs tell of it again."""

    new: NewRequest
    params: SamplingParams
    ids: list[int]  # of the prompt
    prompt: str | None = None  # its text, where it was one


def check_types(sampling_params: object, request_id: object) -> None:
    """Refuse arguments in another order than (prompt, sampling_params, request_id). Raises TypeError, naming the argument."""
    if sampling_params is not None and not isinstance(sampling_params, SamplingParams):
        said = f"sampling_params: SamplingParams or None, not {type(sampling_params).__name__}"
        raise TypeError(f"{said}; the order is prompt, sampling_params, request_id")
    if request_id is not None and not isinstance(request_id, str):
        raise TypeError(f"request_id: a text or None, not {type(request_id).__name__}; the order is prompt, sampling_params, request_id")


def prepare(model: Model, prompt: Prompt, params: SamplingParams, every_step: bool, name: str = "prompt") -> Prepared:
    """The request that a prompt makes. Raises ValueError, naming the field; `name`: the argument that the prompt is."""
    fields = _fields(params)
    text, given = parts(prompt, name)
    try:
        body = parse(_encode({**fields, "prompt": "", "stream": every_step}), CompletionBody)
        if every_step and body.best_of not in (None, body.n):
            raise ApiError(400, "best_of: cannot be told before the end; use LLM.generate", "best_of")
        check_completion(msgspec.structs.replace(body, stream=None))
        if given is not None:
            ids = given if isinstance(given, list) else list(given)
        else:
            assert text is not None
            check_text(model.info, model.tokenizer, text, "prompt")
            [ids] = model.tokenizer.encode_batch([text])
        if not ids:
            raise ApiError(400, "prompt: is empty", "prompt")
        max_tokens = room(model.info, len(ids), body.max_tokens, None, "prompt")
        logprobs = -1 if body.logprobs is None else body.logprobs
        new = completions.new_request(model, body, ids, max_tokens, logprobs, "", True, body.best_of)
    except ApiError as error:
        raise ValueError(error.message) from None
    return Prepared(new, params, list(ids), text)


def prepare_chat(model: Model, messages: list[dict[str, Any]], params: SamplingParams, options: dict[str, Any]) -> Prepared:
    """The request that a conversation makes. Raises ValueError, naming the field."""
    fields = _fields(params)
    logprobs, best_of = fields.pop("logprobs", None), fields.pop("best_of", None)
    if logprobs is not None:
        fields |= {"logprobs": True, "top_logprobs": logprobs}
    try:
        if best_of is not None:
            raise ApiError(400, "best_of: a conversation has none", "best_of")
        body = parse(_encode({**fields, **options, "messages": messages}), ChatBody)
        check_chat(body)
        if more := options.keys() - CHAT_OPTIONS:
            raise ApiError(400, f"{min(more)}: is no option of chat; how outputs are sampled is said by SamplingParams", min(more))
        new = chat.prepare(model, body, "")
    except ApiError as error:
        raise ValueError(error.message) from None
    return Prepared(new, params, unpack(new.prompt).tolist())


def output_of(entry: Entry, prepared: Prepared, texts: dict[int, str], eos: frozenset[int]) -> RequestOutput:
    """What an entry has come to; takes the choices' news.

    `texts` keeps each choice's text between calls; `eos`: ids that are no reason to name.
    """
    params = prepared.params
    for choice in entry.choices:
        texts[choice.index] = texts.get(choice.index, "") + choice.take()
    shown = ranked(entry, params.n) if entry.ended and params.best_of is not None else entry.choices
    return RequestOutput(
        request_id=entry.request.hex(),
        outputs=[_output(i, choice, texts[choice.index], params.logprobs is not None, eos) for i, choice in enumerate(shown)],
        finished=entry.ended,
        cached_tokens=max(entry.cached, 0),
        prompt=prepared.prompt,
        prompt_logprobs=None if params.prompt_logprobs is None or entry.unscored else [None, *entry.scores],
        prompt_token_ids=prepared.ids,
    )


def _output(index: int, choice: Choice, text: str, logprobs: bool, eos: frozenset[int]) -> CompletionOutput:
    reason = choice.finish_reason or None
    stop_reason = None if choice.stop_reason in eos else choice.stop_reason
    return CompletionOutput(index, text, list(choice.tokens), reason, stop_reason, list(choice.fresh_logprobs) if logprobs else [])


def _number(value: object) -> int | float:
    """A number of numpy's, say, as one of Python's. Raises ValueError for anything else that JSON has not."""
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise ValueError(f"{value!r} is no value of a parameter")


_encode = msgspec.json.Encoder(enc_hook=_number).encode


def _fields(params: SamplingParams) -> dict[str, Any]:
    fields = {name: value for name, value in msgspec.structs.asdict(params).items() if value is not None}
    for name, value in fields.items():  # JSON has no others: they would become null, the default
        for number in value.values() if isinstance(value, dict) else (value,):
            if isinstance(number, Real) and not isinstance(number, Integral) and not math.isfinite(number):
                raise ValueError(f"{name}: {number} is no finite number")
    if params.logit_bias is not None:
        fields["logit_bias"] = {str(token): value for token, value in params.logit_bias.items()}
    return fields
