"""Every path of the API."""

from __future__ import annotations

from starlette.routing import Route

from frontend.api import chat, completions, openapi, service, tokens

ROUTES = (
    Route("/v1/completions", completions.completions, methods=["POST"]),
    Route("/v1/chat/completions", chat.chat_completions, methods=["POST"]),
    Route("/generate", completions.generate, methods=["POST"]),
    Route("/v1/models", service.models),
    Route("/v1/models/{name:path}", service.model),
    Route("/health", service.health),
    Route("/ready", service.ready),
    Route("/ping", service.health, methods=["GET", "POST"]),
    Route("/version", service.version),
    Route("/load", service.load),
    Route("/tokenize", tokens.tokenize, methods=["POST"]),
    Route("/detokenize", tokens.detokenize, methods=["POST"]),
    Route("/openapi.json", openapi.openapi),
)
