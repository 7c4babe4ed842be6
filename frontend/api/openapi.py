"""`GET /openapi.json`: the API described, its bodies from the types that decode them."""

from __future__ import annotations

import functools
from importlib.metadata import version
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from frontend.api.handling import json_response
from frontend.api.tokens import DetokenizeBody, TokenizeBody
from frontend.validation import ChatBody, CompletionBody, GenerateBody

POSTS: dict[str, tuple[type, str]] = {
    "/v1/completions": (CompletionBody, "Continue one or several prompts."),
    "/v1/chat/completions": (ChatBody, "Answer a conversation."),
    "/generate": (GenerateBody, "Continue a prompt, in one piece."),
    "/tokenize": (TokenizeBody, "The token ids of a text or a conversation."),
    "/detokenize": (DetokenizeBody, "The text of token ids."),
}
GETS = {
    "/v1/models": "The models that can be asked.",
    "/v1/models/{name}": "One model.",
    "/health": "Whether this process lives.",
    "/ready": "Whether a request would be worked on now.",
    "/ping": "Whether this process lives.",
    "/version": "The version of the server.",
    "/load": "The requests in the server.",
    "/openapi.json": "This description.",
}
STREAMED = ("/v1/completions", "/v1/chat/completions")


async def openapi(request: Request) -> Response:
    """The description."""
    return json_response(description())


@functools.cache
def description() -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    kinds = [kind for kind, _ in POSTS.values()]
    references, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    components["Error"] = {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                },
            }
        },
    }
    paths: dict[str, Any] = {}
    for (path, (_, summary)), reference in zip(POSTS.items(), references, strict=True):
        body = {"required": True, "content": {"application/json": {"schema": reference}}}
        paths[path] = {"post": {"summary": summary, "requestBody": body, "responses": _responses(path in STREAMED)}}
    for path, summary in GETS.items():
        operation: dict[str, Any] = {"summary": summary, "responses": _responses(False)}
        if "{name}" in path:
            operation["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}]
        paths[path] = {"get": operation}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Pagewire", "version": version("pagewire")},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }


def _responses(streamed: bool) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if streamed:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    failure = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {"200": {"description": "the answer", "content": content}, "default": {"description": "why not", "content": failure}}
