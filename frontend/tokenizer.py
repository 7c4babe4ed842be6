"""Text to token ids and back, built from a bundle of tokenizer files with `tokenizers` and `jinja2` alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import msgspec
import tokenizers

from frontend import gguf_tokenizer
from frontend.detokenizer import Decoder, VocabularyDecoder, WindowDecoder, decode_all
from frontend.templates import ChatTemplate
from frontend.token_lengths import most_characters
from frontend.vocabulary import REPLACEMENT, TokenizerError, Vocabulary, read_decoder
from protocol.memory import give_back_freed
from protocol.tokenizer_files import BYTES_ENTRY, GGUF_ENTRY, BundleError, open_bundle

__all__ = ["Tokenizer", "TokenizerError"]

LONG = 500_000  # characters of a batch whose memory is given back
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BYTE_EOS, _BYTE_BOS = 256, 257
_BYTE_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class Encoder(Protocol):
    """Text to ids, many texts at once."""

    def encode_batch(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]: ...


class Tokenizer:
    """A model's tokenizer.

    vocab_size: one more than the largest id. bos: −1 if the model has none. eos: ids that end a text.
    most_characters: of a text that one token can stand for; 0 if no bound is known.
    chat: the chat template, None if the model has none. A rendered chat holds its special tokens already: encode it with
    `add_special_tokens=False`.
    """

    def __init__(
        self,
        encoder: Encoder,
        vocabulary: Vocabulary | None,
        batch_decode: Callable[[list[int], bool], str] | None,
        *,
        vocab_size: int,
        bos: int = -1,
        eos: Sequence[int] = (),
        chat: ChatTemplate | None = None,
        most_characters: int = 0,
    ) -> None:
        """Without a vocabulary, text is decoded through `batch_decode(ids, skip_special_tokens)`."""
        self._encoder = encoder
        self._vocabulary = vocabulary
        self._batch_decode = batch_decode
        self.vocab_size = vocab_size
        self.bos = bos
        self.eos = list(eos)
        self.chat = chat
        self.most_characters = most_characters
        self._adds_bos = bos >= 0 and encoder.encode_batch([""], True)[0][:1] == [bos]

    @staticmethod
    def from_bundle(bundle: bytes) -> Tokenizer:
        """The tokenizer of a bundle (`protocol.tokenizer_files`). Raises TokenizerError."""
        try:
            files = open_bundle(bundle)
        except BundleError as error:
            raise TokenizerError(str(error)) from error
        if BYTES_ENTRY in files:
            return _byte_tokenizer()
        if GGUF_ENTRY not in files and "tokenizer.json" not in files:
            raise TokenizerError("the tokenizer files hold no tokenizer.json")
        try:
            tokenizer = _from_gguf(files[GGUF_ENTRY]) if GGUF_ENTRY in files else _from_folder(files)
        except TokenizerError:
            raise
        except Exception as error:  # of a file whose parts have types that nobody has thought of
            raise TokenizerError(f"the tokenizer files are damaged: {error!r}") from error
        give_back_freed()
        return tokenizer

    def encode_batch(self, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text; other threads run meanwhile. A BOS that a text brings along is not added again.

        Raises ValueError for a text that holds half a surrogate pair.
        """
        try:
            batch = self._encoder.encode_batch(texts, add_special_tokens)
        except (TypeError, UnicodeEncodeError) as error:
            raise ValueError("a text is not valid Unicode: it holds half a surrogate pair") from error
        if not (add_special_tokens and self._adds_bos):
            return batch
        return [ids[1:] if ids[:2] == [self.bos, self.bos] else ids for ids in batch]

    def least_tokens(self, text: str) -> int:
        """A bound on the tokens of a text that needs no tokenizing: it has at least so many."""
        return -(-len(text) // self.most_characters) if self.most_characters else 0

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; ids outside the vocabulary have none, invalid UTF-8 becomes U+FFFD."""
        return decode_all(self.decoder(skip_special_tokens), ids)

    def token_bytes(self, id: int) -> bytes:
        """What one token stands for, special ones too; may be part of a character. Empty outside the vocabulary."""
        if self._vocabulary is None:
            return self.decode([id], skip_special_tokens=False).encode()
        return self._vocabulary.shown.data(id)

    def decoder(self, skip_special_tokens: bool = True, continues: bool = False) -> Decoder:
        """A new incremental decoder; `continues`: its text goes on behind other text."""
        if self._vocabulary is not None:
            return VocabularyDecoder(self._vocabulary, skip_special_tokens, continues)
        decode = self._batch_decode
        assert decode is not None
        return WindowDecoder(lambda ids: decode(ids, skip_special_tokens))


class _TokenizersEncoder:
    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend

    def encode_batch(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        # The batch call releases the GIL, `encode` does not; the fast one leaves out offsets.
        batch = [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)]
        if sum(map(len, texts)) >= LONG:
            give_back_freed()
        return batch


class _BytesEncoder:
    def encode_batch(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        return [list(text.encode()) for text in texts]


def _byte_tokenizer() -> Tokenizer:
    def piece(token: int) -> bytes:
        if token < 256:
            return bytes([token])
        # Ids of a larger model (random weights under this tokenizer) show as a character each, so that streams have text.
        return {_BYTE_EOS: b"<eos>", _BYTE_BOS: b"<bos>"}.get(token, REPLACEMENT.encode())

    vocabulary = Vocabulary(piece, (_BYTE_EOS, _BYTE_BOS), lambda data: data)
    chat = ChatTemplate(_BYTE_TEMPLATE)
    return Tokenizer(_BytesEncoder(), vocabulary, None, vocab_size=258, bos=_BYTE_BOS, eos=[_BYTE_EOS], chat=chat, most_characters=1)


def _from_backend(backend: tokenizers.Tokenizer, bos: int | None, eos: Sequence[int], chat: ChatTemplate | None) -> Tokenizer:
    added = backend.get_added_tokens_decoder()
    tokens = backend.get_vocab(with_added_tokens=True)
    size = max(tokens.values(), default=-1) + 1  # ids may have gaps
    known = read_decoder(json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else None)
    vocabulary = None
    if known is not None:
        token_of, data_of = backend.id_to_token, known.token

        def piece(token: int) -> bytes | None:
            string = token_of(token) if 0 <= token < size else None
            return None if string is None else data_of(string)

        vocabulary = Vocabulary(piece, (i for i, token in added.items() if token.special), known.first)
    return Tokenizer(
        _TokenizersEncoder(backend),
        vocabulary,
        backend.decode,
        vocab_size=size,
        bos=-1 if bos is None else bos,
        eos=eos,
        chat=chat,
        most_characters=most_characters(backend, tokens),
    )


def _from_gguf(packed: bytes) -> Tokenizer:
    try:
        tables = msgspec.msgpack.decode(packed, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{GGUF_ENTRY} is damaged: {error}") from error
    backend = gguf_tokenizer.build(tables)
    tokens = tables["tokenizer.ggml.tokens"]
    named = {f"{name}_token": gguf_tokenizer.special_id(tables, gguf) for name, gguf in _GGUF_NAMES.items()}
    special = {name: tokens[i] for name, i in named.items() if i is not None}
    ends = [gguf_tokenizer.special_id(tables, name) for name in ("eos", "eot", "eom")]
    template = tables.get("tokenizer.chat_template")
    chat = ChatTemplate(template, special) if isinstance(template, str) else None
    return _from_backend(backend, named["bos_token"], list(dict.fromkeys(i for i in ends if i is not None)), chat)


_GGUF_NAMES = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "cls": "cls", "mask": "mask"}


def _from_folder(files: Mapping[str, bytes]) -> Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
    except Exception as error:  # `tokenizers` raises bare Exception
        raise TokenizerError(f"tokenizer.json cannot be used: {error}") from error
    backend.no_padding()
    backend.no_truncation()
    config = {**_json(files, "special_tokens_map.json"), **_json(files, "tokenizer_config.json")}
    special = {name: text for name in _SPECIAL_NAMES if (text := _token_text(config.get(name))) is not None}
    bos = backend.token_to_id(special["bos_token"]) if "bos_token" in special else None
    chat = _chat_template(files, config, special)
    return _from_backend(backend, bos, _eos(files, backend, special), chat)


def _json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        value = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{name} must hold an object")
    return value


def _token_text(value: Any) -> str | None:
    """A special token's text; files write it as a string or as an object with `content`."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _eos(files: Mapping[str, bytes], backend: tokenizers.Tokenizer, special: Mapping[str, str]) -> list[int]:
    """generation_config.json's, else config.json's, else the tokenizer's own."""
    config = _json(files, "config.json")
    text = config.get("text_config") or {}
    if not isinstance(text, dict):
        raise TokenizerError("config.json: text_config must be an object")
    for source in (_json(files, "generation_config.json"), config, text):
        value = source.get("eos_token_id")
        ids = [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]
        if ids:
            return ids
    own = backend.token_to_id(special["eos_token"]) if "eos_token" in special else None
    return [] if own is None else [own]


def _chat_template(files: Mapping[str, bytes], config: Mapping[str, Any], special: Mapping[str, str]) -> ChatTemplate | None:
    """A file of its own wins over tokenizer_config.json; of several named templates the one called "default" is taken."""
    source = config.get("chat_template")
    if "chat_template.jinja" in files:
        source = files["chat_template.jinja"].decode(errors="replace")
    elif "chat_template.json" in files:
        source = _json(files, "chat_template.json").get("chat_template")
    if isinstance(source, list):
        source = next((entry.get("template") for entry in source if isinstance(entry, dict) and entry.get("name") == "default"), None)
    return ChatTemplate(source, special) if isinstance(source, str) else None
