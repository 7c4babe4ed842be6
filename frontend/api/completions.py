"""`POST /v1/completions` and `POST /generate`."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from frontend.api.answers import Form
from frontend.api.completion_answer import CompletionAnswer
from frontend.api.handling import client_of, json_response, read_body, respond, submit, tenant_of, wait_whole
from frontend.api.resuming import LAST_EVENT, resume
from frontend.client import Client, Model
from frontend.entries import NewRequest
from frontend.errors import ApiError, from_failed
from frontend.resume import Header, TextOptions, with_headers
from frontend.sampling import check_text, limited, packed_ids, resolve, room, seeds_of
from frontend.validation import (
    MAX_CHOICES,
    CompletionBody,
    GenerateBody,
    Sampling,
    StreamOptions,
    check_completion,
    check_stream,
    parse,
    prompts_of,
    require,
    stops_of,
)
from protocol.columns import unpack

COMPLETION_TOKENS = 16  # OpenAI's default
MAX_READY = 1024  # token ids, and characters of stop strings; 200 ids take 0.25 ms where nothing is cached, by way of a thread 0.45


async def completions(request: Request) -> ASGIApp:
    """Continue one or several prompts."""
    client = client_of(request)
    if LAST_EVENT in request.headers:
        return await resume(request)
    body = parse(await read_body(request), CompletionBody)
    check_completion(body)
    check_stream(body)
    model = client.model(body.model)
    if is_ready(body):
        new, echoes = prepare(model, body, tenant_of(request))
    else:
        new, echoes = await client.offload(lambda: prepare(model, body, tenant_of(request)))
    form = form_of(client, model, body, body.logprobs is not None, echoes)
    if body.best_of is not None:
        form = replace(form, best=body.n or 1)
    if body.echo and body.logprobs is not None:
        form = replace(form, echo_logprobs=body.logprobs)
    if body.stream:
        new = with_headers(new, header_of("completion", form, text_options(body, True)), echoes)
    stream = submit(request, new)
    return await respond(request, stream, CompletionAnswer(stream, model.tokenizer, form), bool(body.stream))


async def generate(request: Request) -> Response:
    """The simplest way in: a prompt, and its continuation in one piece."""
    client = client_of(request)
    body = parse(await read_body(request), GenerateBody)
    model = client.model(body.model)
    sampling = Sampling(temperature=body.temperature)

    def prepare() -> NewRequest:
        check_text(model.info, model.tokenizer, body.prompt, "prompt")
        [ids] = model.tokenizer.encode_batch([body.prompt])
        require(len(ids) > 0, "prompt", "is empty")
        max_tokens = room(model.info, len(ids), body.max_tokens, None, "prompt")
        return new_request(model, sampling, ids, max_tokens, -1, tenant_of(request), True)

    stream = submit(request, [await client.offload(prepare)])
    try:
        await wait_whole(request, stream)
        [entry] = stream.entries
        if entry.error is not None:
            raise from_failed(entry.error)
        if entry.moved:
            raise ApiError(503, "another frontend answers this request now", code="moved")
        [choice] = entry.choices
        return json_response({"request_id": entry.request.hex(), "text": choice.take(), "tokens_generated": len(choice.tokens)})
    finally:
        stream.close()


def is_ready(body: CompletionBody) -> bool:
    """Whether a body has nothing for the tokenizer, and little of the rest: not worth a thread."""
    ids, more = body.prompt, body.echo or body.bad_words or body.logit_bias or len("".join(body.stop or "")) > MAX_READY
    return bool(isinstance(ids, list) and ids and isinstance(ids[0], int) and len(ids) <= MAX_READY and not more)


def prepare(model: Model, body: CompletionBody, tenant: str) -> tuple[list[NewRequest], list[str]]:
    """The requests of a body, one per prompt, and the text to echo of each. Runs in a thread, unless `is_ready`. Raises ApiError."""
    prompts = encode(model, body)
    require(
        len(prompts) * (body.best_of or body.n or 1) <= MAX_CHOICES, "n", f"makes more than {MAX_CHOICES} choices of {len(prompts)} prompts"
    )
    logprobs = -1 if body.logprobs is None else body.logprobs
    rooms = [room(model.info, len(ids), body.max_tokens, COMPLETION_TOKENS, "prompt") for ids in prompts]
    new = new_requests(model, body, prompts, rooms, logprobs, tenant, True, body.best_of, logprobs if body.echo else -1)
    return new, echoed(model, body, prompts) if body.echo else []


def echoed(model: Model, body: CompletionBody, encoded: Sequence[list[int]]) -> list[str]:
    """The text of each prompt: as it was given, or that of its ids."""
    return [
        prompt if isinstance(prompt, str) else model.tokenizer.decode(ids, body.skip_special_tokens)
        for prompt, ids in zip(prompts_of(body.prompt), encoded, strict=True)
    ]


def encode(model: Model, body: CompletionBody) -> list[list[int]]:
    """The token ids of each prompt. Raises ApiError for a prompt without tokens, and for a text that no context holds."""
    prompts = prompts_of(body.prompt)
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    for text in texts:
        check_text(model.info, model.tokenizer, text, "prompt")
    if texts:
        encoded = model.tokenizer.encode_batch(texts, body.add_special_tokens)
    else:
        encoded = [prompt for prompt in prompts if not isinstance(prompt, str)]
    for ids in encoded:
        require(len(ids) > 0, "prompt", "is empty")
    return encoded


def new_request(
    model: Model, body: Sampling, ids: list[int], max_tokens: int, logprobs: int, tenant: str, continues: bool, best_of: int | None = None
) -> NewRequest:
    """What goes to the scheduler for a body of one prompt, as `new_requests`."""
    [new] = new_requests(model, body, [ids], [max_tokens], logprobs, tenant, continues, best_of)
    return new


def new_requests(
    model: Model,
    body: Sampling,
    prompts: Sequence[list[int]],
    rooms: Sequence[int],
    logprobs: int,
    tenant: str,
    continues: bool,
    best_of: int | None = None,
    echo_logprobs: int = -1,
) -> list[NewRequest]:
    """What goes to the scheduler for each prompt (token ids); what they have in common is made once. Raises ApiError.

    `rooms`: tokens that the choices of each prompt may have. `continues`: the output goes on with the prompt's own text.
    `best_of`: so many choices are made, of which the best `n` will be shown. `echo_logprobs`: alternatives to each prompt
    token that an echo will show, beside what the body asks for.
    """
    if best_of is not None:
        logprobs = max(logprobs, 0)  # they are ranked by them
    text = text_options(body, continues)
    open_text = text.open(model.tokenizer)
    prompt_logprobs = max(-1 if body.prompt_logprobs is None else body.prompt_logprobs, echo_logprobs)
    params = resolve(body, model.info, model.tokenizer, logprobs, prompt_logprobs)
    return [
        NewRequest(
            request=os.urandom(16),
            model=model.info.name,
            prompt=packed_ids(ids, "prompt", model.info.vocab_size),
            params=limited(params, max_tokens),
            seeds=seeds_of(body.seed, best_of or body.n or 1),
            open_text=open_text,
            has_stop_strings=bool(text.stops),
            show_stop_ids=body.include_stop_str_in_output,
            every_step=bool(body.stream),
            deadline=body.queue_timeout or 0.0,
            priority=body.priority,
            tenant=tenant,
            cache_salt=(body.cache_salt or "").encode(),
        )
        for ids, max_tokens in zip(prompts, rooms, strict=True)
    ]


def text_options(body: Sampling, continues: bool) -> TextOptions:
    """How the body wants its text made. Raises ApiError."""
    return TextOptions(stops_of(body.stop), body.include_stop_str_in_output, body.skip_special_tokens, continues, body.min_tokens)


def header_of(kind: Literal["chat", "completion"], form: Form, text: TextOptions) -> Header:
    """What another frontend needs to go on with an answer of this form."""
    return Header(
        kind=kind,
        first=0,
        model=form.model,
        created=form.created,
        include_usage=form.include_usage,
        return_token_ids=form.return_token_ids,
        logprobs=form.logprobs,
        echo="",
        text=text,
        continuous_usage=form.continuous_usage,
        echo_logprobs=form.echo_logprobs,
    )


def form_of(client: Client, model: Model, body: Sampling, logprobs: bool, echoes: list[str]) -> Form:
    """The form of the answer that a body asks for."""
    options = body.stream_options or StreamOptions()
    return Form(
        model=client.public_name(model.info),
        created=int(time.time()),
        eos=frozenset(unpack(model.info.eos).tolist()),
        include_usage=options.include_usage,
        continuous_usage=options.continuous_usage_stats,
        prompt_logprobs=-1 if body.prompt_logprobs is None else body.prompt_logprobs,
        return_token_ids=bool(body.return_token_ids),
        logprobs=logprobs,
        echoes=echoes,
    )
