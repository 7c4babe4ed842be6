"""`POST /tokenize` and `POST /detokenize`, as vLLM has them."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from frontend.api import chat
from frontend.api.handling import client_of, json_response, read_body
from frontend.sampling import checked_ids
from frontend.validation import MAX_PROMPTS, MAX_TOKENIZED, ChatBody, check_roles, parse, require


class TokenizeBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body of `POST /tokenize`: a text, or a conversation as it would be given to the model."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], msgspec.Meta(min_length=1, max_length=MAX_PROMPTS)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False


class DetokenizeBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body of `POST /detokenize`."""

    tokens: Annotated[list[int], msgspec.Meta(max_length=MAX_TOKENIZED)]
    model: str | None = None


async def tokenize(request: Request) -> Response:
    """The token ids of a text or a conversation."""
    client = client_of(request)
    body = parse(await read_body(request), TokenizeBody)
    require((body.prompt is None) != (body.messages is None), "prompt", "one of prompt and messages is needed")
    model = client.model(body.model)

    def encode() -> tuple[list[int], list[str] | None]:
        if body.messages is not None:
            text, param, special = chat.render(model, conversation(body)), "messages", False  # it brings its own
        else:
            text, param, special = body.prompt or "", "prompt", body.add_special_tokens
        require(len(text) <= MAX_TOKENIZED, param, f"has more than {MAX_TOKENIZED} characters")
        [ids] = model.tokenizer.encode_batch([text], special)
        pieces = [model.tokenizer.token_bytes(id).decode(errors="replace") for id in ids] if body.return_token_strs else None
        return ids, pieces

    ids, pieces = await client.offload_aside(encode)
    return json_response({"count": len(ids), "max_model_len": model.info.max_model_len, "tokens": ids, "token_strs": pieces})


async def detokenize(request: Request) -> Response:
    """The text of token ids, special tokens included."""
    client = client_of(request)
    body = parse(await read_body(request), DetokenizeBody)
    model = client.model(body.model)

    def decode() -> str:
        return model.tokenizer.decode(checked_ids(body.tokens, "tokens", model.info.vocab_size), skip_special_tokens=False)

    return json_response({"prompt": await client.offload_aside(decode)})


def conversation(body: TokenizeBody) -> ChatBody:
    """The conversation of a body, checked as chat checks it. Raises ApiError."""
    check_roles(body.messages or [])
    both = bool(body.add_generation_prompt) and body.continue_final_message
    require(not both, "continue_final_message", "contradicts add_generation_prompt")
    return ChatBody(
        messages=body.messages or [],
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        chat_template_kwargs=body.chat_template_kwargs,
    )
