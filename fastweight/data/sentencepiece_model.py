"""What a SentencePiece .model file says about its own treatment of text, read from the file itself.

The file is a protocol buffer (fields: sentencepiece_model.proto of github.com/google/sentencepiece). Only the few
settings that decide which bytes a piece stands for are read, so no protocol-buffer package is needed.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

_TRAINER, _NORMALIZER, _DENORMALIZER = 2, 3, 5
_CHARSMAP, _DUMMY_PREFIX, _EXTRA_WHITESPACES, _ESCAPE_WHITESPACES = 2, 3, 4, 5
_WHITESPACE_SUFFIX = 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """rewrites_characters: characters are replaced before encoding. rewrites_output: or after decoding.

    add_dummy_prefix: a space is put before the text. remove_extra_whitespaces: spaces at the ends and repeated ones are
    dropped. escape_whitespaces: a space is written U+2581. whitespace_suffix: it ends a piece instead of beginning one.
    """

    rewrites_characters: bool
    rewrites_output: bool
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool
    whitespace_suffix: bool


def read_settings(model: bytes) -> ModelSettings:
    """Return the settings in the .model file with these bytes. Raises ValueError if they are not such a file."""
    parts: dict[int, dict[int, Any]] = {_TRAINER: {}, _NORMALIZER: {}, _DENORMALIZER: {}}
    for number, value in _fields(model):
        if number in parts and isinstance(value, bytes):
            parts[number] |= dict(_fields(value))
    trainer, normalizer = parts[_TRAINER], parts[_NORMALIZER]
    return ModelSettings(
        rewrites_characters=bool(normalizer.get(_CHARSMAP)),
        rewrites_output=bool(parts[_DENORMALIZER].get(_CHARSMAP)),
        add_dummy_prefix=bool(normalizer.get(_DUMMY_PREFIX, True)),
        remove_extra_whitespaces=bool(normalizer.get(_EXTRA_WHITESPACES, True)),
        escape_whitespaces=bool(normalizer.get(_ESCAPE_WHITESPACES, True)),
        whitespace_suffix=bool(trainer.get(_WHITESPACE_SUFFIX, False)),
    )


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Every field of one message: its number, and its value as an integer or as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == 2:
            length, at = _varint(data, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of unknown wire type {kind} at byte {at}")
        if at + length > len(data):
            raise ValueError(f"it ends inside a field, at byte {len(data)}")
        yield number, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 64:
        byte = data[at]
        value, shift, at = value | (byte & 0x7F) << shift, shift + 7, at + 1
        if byte < 0x80:
            return value, at
    raise ValueError(f"a broken number at byte {at}")
