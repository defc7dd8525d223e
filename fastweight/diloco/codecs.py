"""Codecs: a flat float32 vector as fewer bytes and back, the same on every machine.

fp32 is exact. bf16 rounds to the nearest. int8 and int4 divide blocks of 128 and 32 by their largest magnitude and
round. topk2 keeps the largest 2 % of every 4096 entries and says of each its sign and which of two magnitudes it has
(after SparseLoCo, Sarfi et al. 2025, arXiv:2508.15706; the two magnitudes are the means of the smaller and the larger
half). `Feedback` keeps what a codec has lost and adds it to what is sent next.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastweight.configs import near_names, require

Encoded = dict[str, Tensor]
INT8_BLOCK, INT4_BLOCK, CHUNK, KEPT = 128, 32, 4096, 82


class Codec(NamedTuple):
    """encode: [n] float32 → tensors. decode(tensors, n) → [n] float32; raises ValueError for what does not fit."""

    name: str
    encode: Callable[[Tensor], Encoded]
    decode: Callable[[Encoded, int], Tensor]


def codec(name: str) -> Codec:
    """The codec `name`."""
    require(name in CODECS, f"unknown codec {name!r}.{near_names(name, CODECS)}")
    return CODECS[name]


class Feedback:
    """Sends vectors through a codec and carries what is lost over to the next (error feedback).

    decay: part of the lost that is carried. `left`: what is to be added next, None for nothing; `before`: what was
    added to the last one.
    Source: Seide et al. 2014, "1-bit SGD"; Karimireddy et al. 2019, arXiv:1901.09847.
    """

    def __init__(self, name: str, decay: float = 1.0, left: Tensor | None = None):
        self.codec, self.decay, self.left, self.before = codec(name), decay, left, left

    def encode(self, vector: Tensor) -> Encoded:
        """The code of `vector` plus what was left. Exact codecs leave nothing."""
        wanted = vector if self.left is None else vector + self.left
        encoded, self.before = self.codec.encode(wanted), self.left
        if self.codec.name != "fp32":
            self.left = (wanted - self.codec.decode(encoded, wanted.numel())) * self.decay
        return encoded

    def take_back(self) -> None:
        """The last vector did not arrive and is not missed: be as if it had not been encoded."""
        self.left = self.before


def _blocks(vector: Tensor, size: int) -> Tensor:
    """[n] → [blocks, size], zeros at the end."""
    return F.pad(vector, (0, -vector.numel() % size)).view(-1, size)


def _take(encoded: Encoded, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A part of a code that was written elsewhere. Raises ValueError unless it is as it must be."""
    found = encoded.get(name)
    fits = found is not None and found.dtype == dtype and tuple(found.shape) == shape
    came = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
    require(fits, f"code: {name} must be {dtype} {list(shape)}, got {came}.")
    assert found is not None
    return found


def _encode_as(dtype: torch.dtype) -> Callable[[Tensor], Encoded]:
    return lambda vector: {"values": vector.to(dtype)}


def _decode_as(dtype: torch.dtype) -> Callable[[Encoded, int], Tensor]:
    return lambda encoded, n: _take(encoded, "values", dtype, (n,)).float()


def _scaled(vector: Tensor, size: int, top: int) -> tuple[Tensor, Tensor]:
    """Whole numbers in [-top, top] of each block, float32 [blocks, size], and the blocks' scales [blocks]."""
    blocks = _blocks(vector, size)
    scale = blocks.abs().amax(1) / top
    return (blocks / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round().clamp(-top, top), scale


def _encode_int8(vector: Tensor) -> Encoded:
    numbers, scale = _scaled(vector, INT8_BLOCK, 127)
    return {"values": numbers.to(torch.int8).view(-1), "scale": scale}


def _decode_int8(encoded: Encoded, n: int) -> Tensor:
    blocks = -(-n // INT8_BLOCK)
    values = _take(encoded, "values", torch.int8, (blocks * INT8_BLOCK,)).view(blocks, -1)
    return (values.float() * _take(encoded, "scale", torch.float32, (blocks,))[:, None]).view(-1)[:n]


def _encode_int4(vector: Tensor) -> Encoded:
    numbers, scale = _scaled(vector, INT4_BLOCK, 7)
    nibbles = (numbers.view(-1) + 8).to(torch.uint8).view(-1, 2)
    return {"values": nibbles[:, 0] | (nibbles[:, 1] << 4), "scale": scale.bfloat16()}


def _decode_int4(encoded: Encoded, n: int) -> Tensor:
    blocks = -(-n // INT4_BLOCK)
    packed = _take(encoded, "values", torch.uint8, (blocks * INT4_BLOCK // 2,))
    numbers = torch.stack((packed & 15, packed >> 4), 1).view(blocks, -1).float() - 8
    return (numbers * _take(encoded, "scale", torch.bfloat16, (blocks,)).float()[:, None]).view(-1)[:n]


def _encode_topk2(vector: Tensor) -> Encoded:
    blocks = _blocks(vector, CHUNK)
    indices = blocks.abs().topk(KEPT, dim=1).indices.sort(1).values
    kept = blocks.gather(1, indices)
    magnitudes, half = kept.abs().sort(1).values, KEPT // 2
    levels = torch.stack((magnitudes[:, :half].mean(1), magnitudes[:, half:].mean(1)), 1)
    large = kept.abs() >= levels.mean(1, keepdim=True)
    bits = (kept < 0).to(torch.uint8) | (large.to(torch.uint8) << 1)
    return {"indices": _pack_indices(indices), "bits": _pack_bits(bits), "levels": levels}


def _decode_topk2(encoded: Encoded, n: int) -> Tensor:
    rows = -(-n // CHUNK)
    indices = _unpack_indices(_take(encoded, "indices", torch.uint8, (rows, KEPT // 2 * 3)))
    bits = _unpack_bits(_take(encoded, "bits", torch.uint8, (rows, -(-KEPT // 4))))[:, :KEPT]
    levels = _take(encoded, "levels", torch.float32, (rows, 2))
    values = levels.gather(1, (bits >> 1).long()) * (1 - 2 * (bits & 1).float())
    return torch.zeros(rows, CHUNK).scatter_(1, indices, values).view(-1)[:n]


def _pack_indices(indices: Tensor) -> Tensor:
    """Two numbers below 4096 in three bytes."""
    low, high = indices[:, 0::2], indices[:, 1::2]
    parts = (low & 255, (low >> 8) | ((high & 15) << 4), high >> 4)
    return torch.stack(parts, 2).to(torch.uint8).flatten(1)


def _unpack_indices(packed: Tensor) -> Tensor:
    first, middle, last = packed.view(packed.shape[0], -1, 3).long().unbind(2)
    return torch.stack((first | ((middle & 15) << 8), (middle >> 4) | (last << 4)), 2).flatten(1)


def _pack_bits(bits: Tensor) -> Tensor:
    """Four numbers below 4 in a byte."""
    a, b, c, d = F.pad(bits, (0, -bits.shape[1] % 4)).view(bits.shape[0], -1, 4).unbind(2)
    return a | (b << 2) | (c << 4) | (d << 6)


def _unpack_bits(packed: Tensor) -> Tensor:
    return torch.stack([(packed >> shift) & 3 for shift in (0, 2, 4, 6)], 2).flatten(1)


CODECS = {
    "fp32": Codec("fp32", _encode_as(torch.float32), _decode_as(torch.float32)),
    "bf16": Codec("bf16", _encode_as(torch.bfloat16), _decode_as(torch.bfloat16)),
    "int8": Codec("int8", _encode_int8, _decode_int8),
    "int4": Codec("int4", _encode_int4, _decode_int4),
    "topk2": Codec("topk2", _encode_topk2, _decode_topk2),
}
