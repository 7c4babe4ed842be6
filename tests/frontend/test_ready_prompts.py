"""A prompt of a few token ids is prepared at once; whatever needs the tokenizer, or takes long, goes to a thread."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from frontend.api.completions import MAX_READY, is_ready
from frontend.validation import CompletionBody, parse


@pytest.mark.parametrize(
    ("fields", "ready"),
    [
        ({"prompt": [1, 2, 3]}, True),
        ({"prompt": [1] * MAX_READY}, True),
        ({"prompt": [1] * (MAX_READY + 1)}, False),
        ({"prompt": "text"}, False),
        ({"prompt": ["text"]}, False),
        ({"prompt": [[1, 2], [3]]}, False),
        ({"prompt": []}, False),
        ({"prompt": [1, 2], "echo": True}, False),
        ({"prompt": [1, 2], "bad_words": ["word"]}, False),
        ({"prompt": [1, 2], "stop": "\n"}, True),
        ({"prompt": [1, 2], "stop": ["\n", "x" * MAX_READY]}, False),
        ({"prompt": [1, 2], "logit_bias": {"3": 1.0}}, False),
    ],
)
def test_only_few_ids_are_prepared_without_a_thread(fields: dict[str, Any], ready: bool) -> None:
    assert is_ready(parse(msgspec.json.encode(fields), CompletionBody)) is ready
