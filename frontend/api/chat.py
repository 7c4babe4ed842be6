"""`POST /v1/chat/completions`."""

from __future__ import annotations

from starlette.requests import Request
from starlette.types import ASGIApp

from frontend.api.chat_answer import ChatAnswer
from frontend.api.completions import form_of, header_of, new_request, text_options
from frontend.api.handling import client_of, read_body, respond, submit, tenant_of
from frontend.api.resuming import LAST_EVENT, resume
from frontend.client import Model
from frontend.entries import NewRequest
from frontend.errors import ApiError
from frontend.resume import with_headers
from frontend.sampling import check_text, room
from frontend.templates import TemplateError
from frontend.validation import ChatBody, check_chat, check_stream, parse, require


async def chat_completions(request: Request) -> ASGIApp:
    """Answer a conversation."""
    client = client_of(request)
    if LAST_EVENT in request.headers:
        return await resume(request)
    body = parse(await read_body(request), ChatBody)
    check_chat(body)
    check_stream(body)
    model = client.model(body.model)
    new = await client.offload(lambda: prepare(model, body, tenant_of(request)))
    form = form_of(client, model, body, bool(body.logprobs), [])
    if body.stream:
        [new] = with_headers([new], header_of("chat", form, text_options(body, body.continue_final_message)), [])
    stream = submit(request, [new])
    return await respond(request, stream, ChatAnswer(stream, model.tokenizer, form), bool(body.stream))


def prepare(model: Model, body: ChatBody, tenant: str) -> NewRequest:
    """The request of a body. Runs in a thread. Raises ApiError."""
    text = render(model, body)
    check_text(model.info, model.tokenizer, text, "messages")
    ids = encode(model, text)
    require(len(ids) > 0, "messages", "make an empty prompt")
    newer = body.max_completion_tokens is not None
    asked = body.max_completion_tokens if newer else body.max_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else -1
    max_tokens = room(model.info, len(ids), asked, None, "messages", "max_completion_tokens" if newer else "max_tokens")
    return new_request(model, body, ids, max_tokens, logprobs, tenant, body.continue_final_message)


def render(model: Model, body: ChatBody) -> str:
    """A conversation under the model's template. Raises ApiError."""
    if model.tokenizer.chat is None:
        raise ApiError(400, "this model has no chat template; use /v1/completions", "model", "no_chat_template")
    generation = not body.continue_final_message if body.add_generation_prompt is None else body.add_generation_prompt
    values = body.chat_template_kwargs or {}
    for name in ("add_generation_prompt", "continue_final_message"):
        require(name not in values, "chat_template_kwargs", f"{name} is a field of the request's own")
    try:
        return model.tokenizer.chat.render(
            body.messages,
            add_generation_prompt=generation,
            continue_final_message=body.continue_final_message,
            **values,
        )
    except TemplateError as error:
        raise ApiError(400, str(error), error.param, error.code) from None


def encode(model: Model, text: str) -> list[int]:
    """The token ids of a rendered conversation, which brings its special tokens along."""
    return model.tokenizer.encode_batch([text], add_special_tokens=False)[0]
