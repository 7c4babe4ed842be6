"""Tokenizers from the tables inside a GGUF file: byte-level BPE ("gpt2") and SentencePiece BPE ("llama").

The keys and the names of pre-tokenizers are the GGUF specification's; a pre-tokenizer cuts text as the model's own
tokenizer.json does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from frontend.vocabulary import TokenizerError

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # of tokenizer.ggml.token_type; other types are ordinary vocabulary

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CL100K = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_TEKKEN = rf"{_CASED}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# Pre-tokenizers by their name in tokenizer.ggml.pre: a pattern, or one of the two that `tokenizers` has built in.
_GPT2, _DIGITS = "gpt2", "digits"
_CUTS = {
    **dict.fromkeys(("default", "gpt-2", "phi-2", "olmo", "mpt", "jina-v2-code", "roberta-bpe", "gigachat"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "dbrx", "falcon3", "pixtral"), _CL100K),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), _QWEN2),
    "tekken": _TEKKEN,
}
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken")  # a word in the vocabulary is never merged
_NFC = ("qwen2", "deepseek-r1-qwen")


def build(tables: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a GGUF's `tokenizer.*` keys. Raises TokenizerError if they are incomplete or of a kind not known."""
    tokens = _table(tables, "tokenizer.ggml.tokens", str)
    types = _table(tables, "tokenizer.ggml.token_type", int, len(tokens)) if "tokenizer.ggml.token_type" in tables else [1] * len(tokens)
    kind, cut = tables.get("tokenizer.ggml.model"), tables.get("tokenizer.ggml.pre", "default")
    if kind == "gpt2":
        tokenizer = _byte_level(tokens, _table(tables, "tokenizer.ggml.merges", str), cut)
        bos_first = cut in _WHOLE_WORDS
    elif kind == "llama":
        scores = _table(tables, "tokenizer.ggml.scores", float, len(tokens))
        tokenizer = _sentencepiece(tokens, types, scores, bool(tables.get("tokenizer.ggml.add_space_prefix", True)))
        bos_first = True
    else:
        raise TokenizerError(f"GGUF tokenizers of kind {kind!r} are not supported; 'gpt2' and 'llama' are")
    _add_tokens(tokenizer, tokens, types)
    bos = special_id(tables, "bos") if tables.get("tokenizer.ggml.add_bos_token", bos_first) else None
    eos = special_id(tables, "eos") if tables.get("tokenizer.ggml.add_eos_token", False) else None
    if bos is not None or eos is not None:
        tokenizer.post_processor = _around(tokens, bos, eos)
    return tokenizer


def special_id(tables: Mapping[str, Any], name: str) -> int | None:
    """The id of a special token ("bos", "eos", "eot", "padding", …), None if the file names none."""
    value = tables.get(f"tokenizer.ggml.{name}_token_id")
    if value is None:
        return None
    if not isinstance(value, int) or not 0 <= value < len(tables["tokenizer.ggml.tokens"]):
        raise TokenizerError(f"tokenizer.ggml.{name}_token_id: {value!r} is no id of the vocabulary")
    return value


def _table(tables: Mapping[str, Any], key: str, kind: type, length: int | None = None) -> list[Any]:
    values = tables.get(key)
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise TokenizerError(f"{key} is missing or damaged")
    if length is not None and len(values) != length:
        raise TokenizerError(f"{key} has {len(values)} entries for {length} tokens")
    return values


def _byte_level(tokens: list[str], merges: list[str], cut: str) -> Tokenizer:
    pattern = _CUTS.get(cut)
    if pattern is None:
        raise TokenizerError(f"the GGUF pre-tokenizer {cut!r} is not supported; supported are {', '.join(sorted(_CUTS))}")
    try:
        pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    except ValueError:
        raise TokenizerError("tokenizer.ggml.merges holds something that is not a pair") from None
    tokenizer = _bpe({token: i for i, token in enumerate(tokens)}, pairs, ignore_merges=cut in _WHOLE_WORDS)
    if cut in _NFC:
        tokenizer.normalizer = normalizers.NFC()
    if pattern == _GPT2:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif pattern == _DIGITS:
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    else:
        steps = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(tokens: list[str], types: list[int], scores: list[float], space_prefix: bool) -> Tokenizer:
    """SentencePiece BPE: the pair whose piece has the best score is merged first; unknown characters become bytes."""
    vocab = {token: i for i, token in enumerate(tokens)}
    ranked: list[tuple[float, int, str, str]] = []
    for token, kind, score in zip(tokens, types, scores, strict=True):
        if kind in (UNKNOWN, CONTROL):
            continue
        splits = ((token[:i], token[i:]) for i in range(1, len(token)))
        known = [(vocab[left], vocab[right], left, right) for left, right in splits if left in vocab and right in vocab]
        ranked.extend((-score, len(ranked) + i, left, right) for i, (_, _, left, right) in enumerate(sorted(known)))
    ranked.sort()
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    pairs = [(left, right) for _, _, left, right in ranked]
    tokenizer = _bpe(vocab, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    marks = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), marks]) if space_prefix else marks
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if space_prefix else steps)
    return tokenizer


def _bpe(vocab: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> Tokenizer:
    try:
        return Tokenizer(models.BPE(vocab, merges, **options))
    except Exception as error:  # `tokenizers` raises bare Exception
        raise TokenizerError(f"the GGUF's vocabulary and merges do not fit together: {error}") from error


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Tokens that text is cut at before anything else: control tokens, and words the model's author added."""
    special = [token for token, kind in zip(tokens, types, strict=True) if kind in (UNKNOWN, CONTROL)]
    added = [token for token, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added])


def _around(tokens: list[str], bos: int | None, eos: int | None) -> processors.TemplateProcessing:
    front = [tokens[bos]] if bos is not None else []
    back = [tokens[eos]] if eos is not None else []
    names = [(tokens[i], i) for i in {bos, eos} if i is not None]
    single = [*front, "$A", *back]
    pair = [*single, *(f"{piece}:1" for piece in [*front, "$B", *back])]
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=names)
