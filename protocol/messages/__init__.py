"""The messages, all of them. Three groups: opening a session, a request's life, a step.

Conventions
    * Every message is a tagged, array-like Struct: on the wire `["tag", field, field, …]`, plain MessagePack.
    * `bytes` fields named as plurals are columns (`columns.py`): little-endian int32 unless said otherwise.
    * Fields are only ever appended, with defaults, so neighbours one minor version apart understand each other.
    * Times are durations in seconds, never clock readings.
    * `check()` runs before any use; it raises BadMessage, and the message is then dropped and counted.

Words
    request   what a client asked for; named by 16 random bytes
    choice    one output of a request (`n` choices, indices from 0)
    handle    a small integer by which one frontend incarnation names its request in step messages
    record    a choice as its worker knows it, from ADMIT to drop; named by an integer of the session
    epoch     orders schedulers: a counter above 32 random bits of the scheduler's start, so that two never tie
    slot      a row of the worker's device state; a record is bound to it while it runs
    step      one plan and its result; numbered from 1 in each session
"""

from __future__ import annotations

from protocol.messages.base import (
    MAX_TOKENS_ANYWHERE,
    PROTOCOL,
    PROTOCOL_OLDEST,
    SCORES_SINCE,
    Defaults,
    Geometry,
    Message,
    ModelInfo,
    Part,
    Scores,
)
from protocol.messages.opening import Drained, FileChunk, FileRequest, Hello, Join, Models, Phase, Ready, Refused, Stale, Welcome
from protocol.messages.requests import (
    MAX_WORD,
    MAX_WORDS,
    Abort,
    Attach,
    Choice,
    Credit,
    Done,
    Failed,
    Gone,
    Journal,
    Moved,
    PromptScores,
    Resumed,
    SamplingParams,
    Submit,
    Tokens,
)
from protocol.messages.steps import DEAD, NAN, STOPPED, Admit, Plan, Progress, Result, Scored

ToScheduler = (
    Hello | Stale | Join | Phase | Ready | FileRequest | FileChunk | Submit | Abort | Done | Attach | Resumed | Result | Progress | Scored
)
FromScheduler = (
    Welcome | Refused | Models | FileRequest | FileChunk | Journal | Gone | Moved | Failed | Credit | Tokens | Plan | Drained | PromptScores
)
Any = ToScheduler | FromScheduler

__all__ = [
    "DEAD",
    "MAX_TOKENS_ANYWHERE",
    "MAX_WORD",
    "MAX_WORDS",
    "NAN",
    "PROTOCOL",
    "PROTOCOL_OLDEST",
    "SCORES_SINCE",
    "STOPPED",
    "Abort",
    "Admit",
    "Any",
    "Attach",
    "Choice",
    "Credit",
    "Defaults",
    "Done",
    "Drained",
    "Failed",
    "FileChunk",
    "FileRequest",
    "FromScheduler",
    "Geometry",
    "Gone",
    "Hello",
    "Join",
    "Journal",
    "Message",
    "ModelInfo",
    "Models",
    "Moved",
    "Part",
    "Phase",
    "Plan",
    "Progress",
    "PromptScores",
    "Ready",
    "Refused",
    "Result",
    "Resumed",
    "SamplingParams",
    "Scored",
    "Scores",
    "Stale",
    "Submit",
    "ToScheduler",
    "Tokens",
    "Welcome",
]
