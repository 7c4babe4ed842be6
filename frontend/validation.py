"""The bodies of requests: their fields, types and limits. What is not understood is refused by name, never dropped."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

import msgspec

from frontend.errors import ApiError

MAX_VALUES = 1 << 17  # strings (keys too), lists and objects of a body
MAX_N = 128  # choices of one request
MAX_PROMPTS = 2048  # prompts of one body
MAX_CHOICES = 4096  # outputs of one body, all prompts together
MAX_STOPS = 16
MAX_STOP_LENGTH = 1024  # characters
MAX_STOPS_LENGTH = 4096  # characters of all stop strings together; the automaton has a table for each
MAX_IDS = 4096  # entries of an id list or of logit_bias
MAX_LOGPROBS = 20
MAX_BAD_WORDS = 256
MAX_TOKENIZED = 4 << 20  # characters to tokenize for their own sake, or ids to detokenize
MAX_BAD_WORD_LENGTH = 256  # characters
MAX_QUEUE_TIMEOUT = 86_400.0  # seconds
ROLES = ("system", "developer", "user", "assistant", "tool", "function")  # OpenAI's; a template may know fewer

T = TypeVar("T")
Number = float | int
N = Annotated[int, msgspec.Meta(ge=1, le=MAX_N)]
Tokens = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]  # 0: only the prompt's log probabilities, or its echo
Stops = str | Annotated[list[str], msgspec.Meta(max_length=MAX_STOPS)] | None
Ids = Annotated[list[int], msgspec.Meta(max_length=MAX_IDS)]
Penalty = Annotated[float, msgspec.Meta(ge=-2.0, le=2.0)]


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """OpenAI's `stream_options`."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class Sampling(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The fields that completions and chat share. None: the client named none."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: N | None = None
    stop: Stops = None
    max_tokens: Tokens | None = None
    prompt_logprobs: Annotated[int, msgspec.Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0.0, le=100.0)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(ge=0.001, le=1000.0)] | None = None  # less may make a logit infinite
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    ignore_eos: bool = False
    stop_token_ids: Ids | None = None
    include_stop_str_in_output: bool = False
    min_tokens: Tokens = 0
    skip_special_tokens: bool = True
    logit_bias: Annotated[dict[str, Annotated[float, msgspec.Meta(ge=-100.0, le=100.0)]], msgspec.Meta(max_length=MAX_IDS)] | None = None
    allowed_token_ids: Ids | None = None
    bad_words: Annotated[list[str], msgspec.Meta(max_length=MAX_BAD_WORDS)] | None = None
    priority: Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)] = 0
    queue_timeout: Annotated[float, msgspec.Meta(gt=0.0, le=MAX_QUEUE_TIMEOUT)] | None = None  # ours
    cache_salt: Annotated[str, msgspec.Meta(min_length=1, max_length=1024)] | None = None
    return_token_ids: bool | None = None
    # what concerns OpenAI's own service only, accepted and without effect
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class CompletionBody(Sampling, kw_only=True, forbid_unknown_fields=True):
    """The body of `POST /v1/completions`."""

    prompt: str | list[str | int | list[int]]
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: N | None = None
    suffix: str | None = None
    add_special_tokens: bool = True


class ChatBody(Sampling, kw_only=True, forbid_unknown_fields=True):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[dict[str, Any]], msgspec.Meta(min_length=1, max_length=MAX_PROMPTS)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None  # true unless the final message goes on
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    modalities: list[str] | None = None


class GenerateBody(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `POST /generate`."""

    prompt: str
    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)] = 100
    temperature: Annotated[float, msgspec.Meta(ge=0.0, le=100.0)] | None = None
    model: str | None = None


_PATH = re.compile(r" - at `\$(?:\.?)([^`]*)`$")
_FIELD = re.compile(r"field `([^`]*)`")
_VALUE = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[{]', re.DOTALL)  # a string, or where a list or an object begins


def parse(body: bytes, kind: type[T]) -> T:
    """Decode and check a body. Raises ApiError: 400 that names the field, 413 for more values than any request has."""
    _check_values(body)
    try:
        decoded: T = _decoder(kind).decode(body)  # type: ignore[arg-type]  # a class is hashable
        return decoded
    except msgspec.ValidationError as error:
        text = str(error)
        where = _PATH.search(text)
        param = where.group(1) if where else ""
        field = _FIELD.search(text)
        if field:  # "missing required field `x`", "unknown field `x`"
            param = f"{param}.{field.group(1)}" if param else field.group(1)
        if "unknown field" in text:
            raise ApiError(400, f"{param} is not supported here", param, "unknown_parameter") from None
        if "missing required field" in text:
            raise ApiError(400, f"{param} is required", param, "missing_required_parameter") from None
        why = _PATH.sub("", text)
        raise ApiError(400, f"{param}: {why}" if param else why, param.split("[")[0].split(".")[0], "invalid_value") from None
    except UnicodeDecodeError:
        at = _bad_byte(body)  # the error counts from the beginning of a string
        raise ApiError(400, f"the body is not UTF-8: byte 0x{body[at]:02x} at offset {at}", code="invalid_json") from None
    except (msgspec.DecodeError, RecursionError, OverflowError) as error:
        raise ApiError(400, f"the body is no JSON: {error}", code="invalid_json") from None


@functools.cache
def _decoder(kind: type[Any]) -> msgspec.json.Decoder[Any]:
    """Fractions in what has no type of ours are read by Python: the decoder takes up to 8 µs for one with a large negative exponent."""
    return msgspec.json.Decoder(kind, float_hook=_finite)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("Number out of range")
    return value


def _check_values(body: bytes) -> None:
    """Refuse a body of too many values before any of them is made: decoding lets no thread run, and collects garbage all the while."""
    if body.count(b'"') + body.count(b"[") + body.count(b"{") <= MAX_VALUES:  # wherever they stand
        return
    if any(count > MAX_VALUES for count, _ in enumerate(_VALUE.finditer(body), 1)):
        raise ApiError(413, f"the body has more than {MAX_VALUES} strings, lists and objects", code="body_too_large")


def _bad_byte(body: bytes) -> int:
    """Offset of the first byte that is no UTF-8."""
    try:
        body.decode()
    except UnicodeDecodeError as error:
        return error.start
    raise AssertionError("the body is UTF-8")


def require(condition: bool, param: str, message: str, code: str = "invalid_value") -> None:
    """Raise ApiError (400) that names `param` unless `condition` holds."""
    if not condition:
        raise ApiError(400, f"{param}: {message}", param, code)


def check_chat(body: ChatBody) -> None:
    """Refuse by name what chat does not do yet, and what contradicts itself. Raises ApiError."""
    require(not body.tools, "tools", "tool calls are not supported", "unsupported_parameter")
    require(body.tool_choice in (None, "none", "auto"), "tool_choice", "tool calls are not supported", "unsupported_parameter")
    plain = body.response_format is None or body.response_format.get("type") == "text"
    require(plain, "response_format", "only the type 'text' is supported", "unsupported_parameter")
    require(body.modalities in (None, ["text"]), "modalities", "only text is supported", "unsupported_parameter")
    require(body.reasoning_effort is None, "reasoning_effort", "is not supported", "unsupported_parameter")
    require(body.top_logprobs is None or bool(body.logprobs), "top_logprobs", "needs logprobs to be true")
    check_max_tokens(body, "max_completion_tokens", body.max_completion_tokens)
    check_max_tokens(body, "max_tokens", body.max_tokens)
    both = bool(body.add_generation_prompt) and body.continue_final_message
    require(not both, "continue_final_message", "contradicts add_generation_prompt")
    check_roles(body.messages)


def check_roles(messages: Sequence[Mapping[str, Any]]) -> None:
    """Demand a role of OpenAI's of every message. Raises ApiError."""
    for i, message in enumerate(messages):
        role = message.get("role")
        require(role in ROLES, f"messages[{i}].role", f"must be one of {', '.join(ROLES)}, not {_brief(role)}" if role else "is missing")


def _brief(value: object) -> str:
    """A value of a client's, short enough for a message."""
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "…"


def check_completion(body: CompletionBody) -> None:
    """Refuse by name what completions do not do yet. Raises ApiError."""
    require(not body.suffix, "suffix", "is not supported", "unsupported_parameter")
    if body.best_of is not None:
        require(body.best_of >= (body.n or 1), "best_of", "is less than n")
        require(not body.stream or body.best_of == (body.n or 1), "best_of", "cannot be told before the end: stream must be false")
    check_max_tokens(body, "max_tokens", body.max_tokens, bool(body.echo))


def prompts_of(prompt: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """The prompts of a completion: a string, a list of strings, token ids, or a list of lists of token ids."""
    if isinstance(prompt, str):
        return [prompt]
    require(len(prompt) > 0, "prompt", "is empty")
    if all(isinstance(item, int) for item in prompt):
        return [prompt]  # type: ignore[list-item]
    require(len(prompt) <= MAX_PROMPTS, "prompt", f"has more than {MAX_PROMPTS} prompts")
    kinds = {type(item) for item in prompt}
    require(len(kinds) == 1 and int not in kinds, "prompt", "mixes strings, ids and lists of ids")
    return prompt  # type: ignore[return-value]


def check_max_tokens(body: Sampling, param: str, asked: int | None, echo: bool = False) -> None:
    """Refuse an output of no tokens where nothing is asked about the prompt. Raises ApiError."""
    require(asked != 0 or echo or body.prompt_logprobs is not None, param, "must be at least 1 without echo or prompt_logprobs")


def check_stream(body: Sampling) -> None:
    """Refuse stream options of an answer that is no stream, as OpenAI does, and what a stream has no place for. Raises ApiError."""
    options = body.stream_options
    require(options is None or bool(body.stream), "stream_options", "needs stream to be true")
    continuous = options is not None and options.continuous_usage_stats and not options.include_usage
    require(not continuous, "stream_options", "continuous_usage_stats needs include_usage to be true")
    require(not body.stream or body.prompt_logprobs is None, "prompt_logprobs", "cannot be told in a stream")


def stops_of(stop: str | list[str] | None) -> list[str]:
    """The stop strings, checked."""
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    for text in stops:
        require(0 < len(text) <= MAX_STOP_LENGTH, "stop", f"each stop string must have 1 to {MAX_STOP_LENGTH} characters")
    together = sum(map(len, stops))
    require(together <= MAX_STOPS_LENGTH, "stop", f"the stop strings have {together} characters together, more than {MAX_STOPS_LENGTH}")
    return stops
