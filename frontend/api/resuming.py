"""`Last-Event-ID`: a client whose stream broke off, since its frontend is lost, repeats its POST here."""

from __future__ import annotations

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp

from frontend.api.answers import Form
from frontend.api.chat_answer import ChatAnswer
from frontend.api.completion_answer import CompletionAnswer
from frontend.api.handling import client_of, read_body, respond, tenant_of
from frontend.errors import from_failed
from frontend.resume import parse_event_id, read_header
from frontend.sse import Watch
from frontend.streams import Stream
from protocol.columns import unpack

LAST_EVENT = "last-event-id"
ANSWERS = {"chat": ChatAnswer, "completion": CompletionAnswer}


async def resume(request: Request) -> ASGIApp:
    """Go on with the stream that the header names; the body does not count. Raises ApiError: 404 if nobody has it."""
    client = client_of(request)
    await read_body(request)
    client.model(None)  # raises 503 before there is a tokenizer to go on with
    positions = parse_event_id(request.headers[LAST_EVENT])
    told = {
        id: [min(choices[i].tokens, 1 << 24) if i in choices else 0 for i in range(max(choices, default=-1) + 1)]
        for id, choices in positions.items()
    }
    stream = client.attach(told, tenant_of(request))
    try:
        await _attached(request, stream)
        headers = {entry.handle: read_header(entry.new.header) for entry in stream.entries}
        stream.entries.sort(key=lambda entry: headers[entry.handle].first)
        header = headers[stream.entries[0].handle]
        model = client.model(stream.entries[0].new.model)
        form = Form(
            model=header.model,
            created=header.created,
            eos=frozenset(unpack(model.info.eos).tolist()),
            include_usage=header.include_usage,
            continuous_usage=header.continuous_usage,
            return_token_ids=header.return_token_ids,
            logprobs=header.logprobs,
            echo_logprobs=header.echo_logprobs,
            echoes=[headers[entry.handle].echo for entry in stream.entries],
        )
        answer = ANSWERS[header.kind](stream, model.tokenizer, form)
        answer.resume(positions)
    except BaseException:
        stream.close()
        raise
    return await respond(request, stream, answer, True)


async def _attached(request: Request, stream: Stream) -> None:
    """Wait until every entry has come. Raises ApiError, ClientDisconnect."""
    watch = Watch(request.receive, stream)
    try:
        while any(entry.attaching for entry in stream.entries):
            await stream.news()
            if stream.gone:
                raise ClientDisconnect
            if stream.error is not None:
                raise stream.error
            stream.quiet = False
            stream.take()
    finally:
        watch.close()
    for entry in stream.entries:
        if entry.error is not None and not entry.choices:
            raise from_failed(entry.error)
        stream.touch(entry, stream.woken)
