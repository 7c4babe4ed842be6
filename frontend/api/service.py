"""What an operator and a client ask about the service itself."""

from __future__ import annotations

from importlib.metadata import version as installed_version

from starlette.requests import Request
from starlette.responses import Response

from frontend.access import ENDING
from frontend.api.handling import client_of, json_response
from frontend.client import Client
from frontend.errors import ApiError
from protocol.messages import ModelInfo


async def health(request: Request) -> Response:
    """This process lives."""
    return json_response({"status": "ok"})


async def ready(request: Request) -> Response:
    """Whether a request would be worked on now; 503 and why, if not."""
    why = client_of(request).why_not_ready()
    if not why:
        return json_response({"status": "ready"})
    request.scope[ENDING] = "not_ready"
    return json_response({"status": "not ready", "reason": why}, 503)


async def version(request: Request) -> Response:
    """Which version this is."""
    return json_response({"version": installed_version("pagewire")})


async def load(request: Request) -> Response:
    """How many requests this process is answering."""
    return json_response({"server_load": sum(not entry.ended for entry in client_of(request).journal.entries())})


async def models(request: Request) -> Response:
    """The models that can be asked."""
    client = client_of(request)
    return json_response({"object": "list", "data": [card(client, request, info) for info in client.models()]})


async def model(request: Request) -> Response:
    """One model by its name."""
    client = client_of(request)
    name = request.path_params["name"]
    for info in client.models():
        if name in (info.name, client.public_name(info)):
            return json_response(card(client, request, info))
    raise ApiError(404, f"the model {name!r} does not exist", "model", "model_not_found")


def card(client: Client, request: Request, info: ModelInfo) -> dict[str, object]:
    """A model as OpenAI lists it, with vLLM's `max_model_len`."""
    return {
        "id": client.public_name(info),
        "object": "model",
        "created": request.app.state.started,
        "owned_by": "pagewire",
        "root": info.name,
        "max_model_len": info.max_model_len,
    }
