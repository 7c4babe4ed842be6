"""The page of the HTTP API, from its OpenAPI description; what a field means stands here, and a test demands that none is missing."""

from __future__ import annotations

from typing import Any

from frontend.api.openapi import description
from frontend.validation import MAX_BAD_WORD_LENGTH, MAX_STOP_LENGTH, MAX_STOPS_LENGTH, MAX_TOKENIZED, MAX_VALUES
from protocol.messages import MAX_WORD
from tables import code, table

IGNORED = "accepted, without effect here"
FIELDS = {
    "add_generation_prompt": "whether the template ends where the assistant begins; by default unless the last message goes on",
    "add_special_tokens": "whether the tokenizer adds BOS and the like",
    "allowed_token_ids": "only these ids may be sampled; `bad_words`, and `min_tokens` of those that end an output, must leave one",
    "bad_words": f"texts whose token sequences are never completed, each of at most {MAX_BAD_WORD_LENGTH} characters and {MAX_WORD} tokens",
    "best_of": "outputs to make, of which the `n` most likely are returned; not streamed",
    "cache_salt": "requests with different salts share no cached blocks",
    "chat_template_kwargs": "variables for the model's chat template, but for those that are fields here",
    "continue_final_message": "the last message is the assistant's, and goes on",
    "continuous_usage_stats": "`usage` in every event",
    "echo": "the prompt stands before the output: its text as it was given, or that of its ids",
    "frequency_penalty": "subtracted from a token's logit for each time that the output has it",
    "ignore_eos": "the model's end token ends nothing",
    "include_obfuscation": IGNORED,
    "include_stop_str_in_output": "whether the stop string is part of the output",
    "include_usage": "a last event with `usage`",
    "logit_bias": "by token id, added to its logit, each −100 … 100",
    "logprobs": "log probabilities: how many alternatives (completions), or whether (chat)",
    "max_completion_tokens": "OpenAI's newer name of `max_tokens`",
    "max_tokens": "of each output; 0, with `echo` or `prompt_logprobs`, asks for the prompt alone",
    "messages": "the conversation, see [below](#messages)",
    "metadata": IGNORED,
    "min_p": "tokens less likely than this share of the most likely one are left out",
    "min_tokens": "before so many neither an end token nor a stop id is sampled, and no stop string is looked for",
    "modalities": 'only `["text"]`',
    "model": "by default the only one, or the first, that is served",
    "n": "outputs",
    "parallel_tool_calls": IGNORED,
    "presence_penalty": "subtracted from the logit of every token that the output has",
    "priority": "lower comes first, under `--policy priority`",
    "prompt": "a text, several, token ids, or several lists of them",
    "prompt_cache_key": IGNORED,
    "prompt_logprobs": "log probabilities of the prompt's tokens, with so many alternatives; not streamed (there, `echo` and `logprobs`)",
    "queue_timeout": "seconds it may wait to be begun, then it is refused with 503 (`queue_timeout`); by default as long as it takes. Ours",
    "reasoning_effort": "not supported",
    "repetition_penalty": "divides the logits of tokens that prompt or output have, 1 is none",
    "response_format": "only the type `text`",
    "return_token_ids": "token ids beside the text",
    "return_token_strs": "the text of each token beside its id",
    "safety_identifier": IGNORED,
    "seed": "the same seed gives the same draws",
    "service_tier": IGNORED,
    "skip_special_tokens": "leave special tokens out of the text",
    "stop": f"texts that end an output, each of at most {MAX_STOP_LENGTH:,} characters, together of {MAX_STOPS_LENGTH:,}",
    "stop_token_ids": "ids that end an output",
    "store": IGNORED,
    "stream": "server-sent events as tokens come",
    "stream_options": "see below; only with `stream`",
    "suffix": "not supported",
    "temperature": "0, as anything below 0.00001, takes the likeliest token; by default the model's own",
    "tokens": "token ids",
    "tool_choice": "only `none` and `auto`",
    "tools": "not supported",
    "top_k": "only the so many most likely tokens; 0 and −1: all",
    "top_logprobs": "alternatives of each token; needs `logprobs`",
    "top_p": "only the most likely tokens that together have this probability",
    "user": IGNORED,
}

NARROWER = {  # by body, where a field takes less than elsewhere
    "GenerateBody": {"prompt": "a text", "max_tokens": "of the output"},
    "TokenizeBody": {"prompt": f"a text of at most {MAX_TOKENIZED:,} characters; either this or `messages`, rendered no longer"},
}

INTRO = f"""# The HTTP API

OpenAI's, and what vLLM adds to it; made from the types that decode requests (`make docs`), as `/openapi.json` is. A field
that is not listed is refused by name (400, `unknown_parameter`), and so is a value outside its bounds. Where no default is
named, a field that is left out, or null, asks for nothing, or the model's own default counts. A body has at most {MAX_VALUES:,}
strings (names of fields too), lists and objects (413, `body_too_large`). How it is used:
[user guide](../guide.md#the-api).
"""

MESSAGES = """## Messages

A message has a `role` (OpenAI's: system, developer, user, assistant, tool, function) and `content`, a string or a list of parts of
type `text` (or `refusal`); parts are joined by line. What else it may have is what the model's chat template reads, so a history with
`tool_calls` and their results works with a model that was trained on them: `arguments`, JSON in a string, become an object for the
template, and `content` may be null beside them. `name` and `tool_call_id` are always accepted. Any other field that holds something is
refused by name, as in `messages[1].tool_calls` (400, `unsupported_parameter`); one that is null or empty asks for nothing. A part has no
other field than `type` and its text (400, `unknown_parameter`).
"""


def api_page() -> str:
    """Markdown of all paths, and of each body's fields."""
    document = description()
    schemas = document["components"]["schemas"]
    rows, sections = [], []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            rows.append((code(f"{method.upper()} {path}"), operation["summary"]))
            if "requestBody" in operation:
                reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
                body = reference.rpartition("/")[2]
                sections += [f"## POST {path}", "", operation["summary"], "", *_fields(schemas, body), ""]
    sections += ["## Stream options", "", *_fields(schemas, "StreamOptions"), "", MESSAGES]
    return "\n".join([INTRO, *table(("path", ""), rows), "", *sections])


def _fields(schemas: dict[str, Any], body: str) -> list[str]:
    schema, texts = schemas[body], {**FIELDS, **NARROWER.get(body, {})}
    rows = []
    for name, field in schema["properties"].items():
        default = field.get("default")
        required = "*required*" if name in schema.get("required", ()) else "" if default is None else code(str(default).lower())
        rows.append((code(name), texts.get(name, ""), _type(field), required))
    return table(("field", "", "type", "default"), rows)


def _type(field: dict[str, Any]) -> str:
    """A schema in words; null, which every optional field takes, is left out."""
    kinds = field.get("anyOf", [field])
    return " or ".join(filter(None, map(_kind, kinds)))


def _kind(kind: dict[str, Any]) -> str:
    match kind.get("type"):
        case "null":
            return ""
        case "array":
            most = f", at most {kind['maxItems']:,}" if "maxItems" in kind else ""
            return f"list of {_type(kind.get('items', {}))}{most}"
        case "object" if "maxProperties" in kind:
            return f"object of at most {kind['maxProperties']:,} fields"
        case "string" if "maxLength" in kind:
            return f"string of {kind['minLength']:,} to {kind['maxLength']:,} characters"
        case "integer" | "number" as name:
            return f"{name}{_bounds(kind)}"
        case None:
            return "object" if "$ref" in kind else "anything"
        case list(names):
            return " or ".join(names)
        case name:
            return str(name)


def _bounds(kind: dict[str, Any]) -> str:
    """As `0 … 2`; bounds of 32 bits and more are not worth a word."""
    low, high = kind.get("minimum", kind.get("exclusiveMinimum")), kind.get("maximum")
    if low is not None and abs(low) >= 2**31:
        low = None
    if high is not None and high >= 2**31 - 1:
        high = None
    above = "above " if "exclusiveMinimum" in kind else ""
    if low is None and high is None:
        return ""
    if high is None:
        return f", {above}{low:g}" + ("" if above else " or more")
    return f", {above}{low:g} … {high:,g}" if low is not None else f", at most {high:,g}"
