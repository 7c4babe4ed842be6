"""Writes tests/data/messages.json: the bytes, in hex, of every example in tests/protocol/message_samples.py.

    python -m tests.tools.make_message_golden

Run it only when the wire is meant to change. A byte that changes in an old entry breaks running neighbours of another
version: fields may be appended, never moved.
"""

from __future__ import annotations

import json
from pathlib import Path

from protocol.codec import encode
from tests.protocol.message_samples import SAMPLES

OUT = Path(__file__).parent.parent / "data" / "messages.json"


def main() -> None:
    OUT.write_text(json.dumps({name: encode(message).hex() for name, message in SAMPLES.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
