"""Writes tests/data/tokenizer_sentencepiece.json: a small SentencePiece BPE vocabulary as a GGUF holds it, and what it makes of texts.

    python tests/tools/make_sentencepiece_golden.py

Needs sentencepiece; the tests that read the file do not.
"""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import sentencepiece

OUT = Path(__file__).parent.parent / "data" / "tokenizer_sentencepiece.json"

CORPUS = """A request comes in as text and leaves as text; in between there are only tokens.
The scheduler decides who runs next and which blocks hold whose keys and values.
A worker keeps its blocks until it is told that nobody needs them, and then it forgets them at once.
If the worker dies, another worker takes over, and the readers of the stream notice nothing but a pause.
Tokens that were shown are never taken back; tokens that were not shown may be sampled again, and come out the same.
def step(plan):\n    for row in plan.rows:\n        yield row.slot, row.start, row.count
Numbers such as 1, 20, 300 and 4096 occur, and so do names such as Anna, Bertram and Charlotte.
Ein Satz auf Deutsch, damit auch ä, ö, ü und ß vorkommen. Une phrase en français, où l'été est déjà passé.
"""

TEXTS = [
    "Hello worker, take the next block.",
    "a",
    " ",
    "   three spaces, then   three more   ",
    "The scheduler decides",
    "tokens tokens tokens",
    "line one\nline two\n\n\tindented",
    "über den Köpfen, où déjà",
    "unseen: 漢字 🎉 Привет ½",
    "numbers 1234567890 and 4096",
    "mixed漢a字b🎉c",
    "▁ the mark itself",
    "def step(plan): return plan.rows[0]",
]


def main() -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines() * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=520,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
        num_threads=1,
    )
    sp = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    size = sp.get_piece_size()
    rng = random.Random(2)
    ids = [[rng.randrange(3, size) for _ in range(rng.randint(1, 12))] for _ in range(40)]
    golden = {
        "tables": {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [sp.id_to_piece(i) for i in range(size)],
            "tokenizer.ggml.scores": [sp.get_score(i) for i in range(size)],
            "tokenizer.ggml.token_type": [_type(sp, i) for i in range(size)],
            "tokenizer.ggml.bos_token_id": sp.bos_id(),
            "tokenizer.ggml.eos_token_id": sp.eos_id(),
            "tokenizer.ggml.unknown_token_id": sp.unk_id(),
        },
        "encode": [[text, sp.encode(text)] for text in TEXTS],
        "decode": [[row, sp.decode(row)] for row in ids],
    }
    OUT.write_text(json.dumps(golden, ensure_ascii=True, indent=0) + "\n")


def _type(sp: sentencepiece.SentencePieceProcessor, i: int) -> int:
    """The GGUF's token type: 1 normal, 2 unknown, 3 control, 6 byte."""
    return 2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1


if __name__ == "__main__":
    main()
