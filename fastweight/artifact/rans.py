"""Asymmetric numeral systems with ranges (Duda 2013, arXiv:1311.2540): many lanes side by side, one table per context.

A lane is a state below 2^32 that stays at 2^16 or more by taking or giving 16-bit words. Symbol i of the stream belongs
to lane i mod lanes; all lanes of a step are one numpy operation, and they share one list of words. The number of lanes
follows from the number of symbols, so it is not stored.
"""

import numpy as np

from fastweight.artifact.tables import ALPHABET, PRECISION, TOTAL
from fastweight.configs import require

SYMBOLS_PER_LANE = 1 << 14  # a lane costs about 2 bytes beyond its symbols' entropy
MOST_LANES = 2048
STEPS = 32  # looked up at once; a matter of speed only
LOWEST = 1 << 16  # of a state
_SHIFT, _SIXTEEN, _PRECISION = np.uint32(32 - PRECISION), np.uint32(16), np.uint32(PRECISION)


def num_lanes(num_symbols: int) -> int:
    """How many lanes a stream of `num_symbols` symbols has."""
    return min(MOST_LANES, max(1, num_symbols // SYMBOLS_PER_LANE))


def encode(symbols: np.ndarray, contexts: np.ndarray, tables: np.ndarray) -> bytes:
    """The stream of symbols uint8 [n], symbol i coded by tables[contexts[i]].

    contexts: integers [n]. tables: [contexts, 256], frequencies as `tables.frequencies` makes them; each symbol must
    have one above 0 in its context. Returns the states, uint32 [lanes], then the words, uint16, all little-endian.
    """
    lanes = num_lanes(len(symbols))
    sizes, starts = (t.reshape(-1).astype(np.uint32) for t in (tables, np.cumsum(tables, axis=1) - tables))
    state, words = np.full(lanes, LOWEST, np.uint32), []
    block = lanes * STEPS
    for begin in range((max(len(symbols), 1) - 1) // block * block, -1, -block):
        index = contexts[begin : begin + block].astype(np.int64) * ALPHABET + symbols[begin : begin + block]
        _encode_block(state, sizes[index], starts[index], words)
    found = np.concatenate(words[::-1]) if words else np.zeros(0, np.uint16)
    return state.astype("<u4").tobytes() + found.astype("<u2").tobytes()


def _encode_block(state: np.ndarray, sizes: np.ndarray, starts: np.ndarray, words: list[np.ndarray]) -> None:
    """Put a block's symbols, last step first, into `state`; append the words that each step gives."""
    lanes = len(state)
    # Division of doubles is exact here (both sides below 2^32) and far faster than that of integers.
    divisor, gaps = sizes.astype(np.float64), TOTAL - sizes
    for begin in range((len(sizes) - 1) // lanes * lanes, -1, -lanes):
        here = slice(begin, min(begin + lanes, len(sizes)))
        x = state[: here.stop - begin]  # a view: the last step of a stream may have fewer symbols than lanes
        full = (x >> _SHIFT) >= sizes[here]
        words.append(x[full].astype(np.uint16))
        np.right_shift(x, _SIXTEEN, out=x, where=full)
        quotient = np.divide(x, divisor[here]).astype(np.uint32)
        quotient *= gaps[here]
        x += quotient
        x += starts[here]


def decode(data: bytes | memoryview, contexts: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Symbols uint8 [n] of a stream that `encode` made with the same contexts [n] and tables.

    Raises ValueError if the bytes are not such a stream: words are missing or left over, or a lane does not end where
    all lanes began.
    """
    lanes = num_lanes(len(contexts))
    fits = len(data) >= 4 * lanes and len(data) % 2 == 0
    require(fits, f"a coded stream of {len(contexts)} symbols needs {4 * lanes} bytes and more, got {len(data)}")
    require(not len(contexts) or bool((tables[np.unique(contexts)].sum(1) == TOTAL).all()), "a table is missing")
    state = np.frombuffer(data, "<u4", lanes).astype(np.uint32)
    words = np.frombuffer(data, "<u2", offset=4 * lanes).astype(np.uint32)
    require(bool((state >= LOWEST).all()), "a coded stream starts with a state that no encoder leaves")
    symbols, position = _decode_lanes(state, words, contexts, tables)
    require(position == len(words), f"a coded stream has {len(words)} words, its symbols take {position}")
    require(bool((state == LOWEST).all()), "a coded stream does not end where it must: it has been altered")
    return symbols


def _decode_lanes(
    state: np.ndarray, words: np.ndarray, contexts: np.ndarray, tables: np.ndarray
) -> tuple[np.ndarray, int]:
    """All symbols and the number of words read; `state` is left as it is after the last symbol."""
    lanes, position = len(state), 0
    lookup = _lookup(tables)
    sizes, starts = (t.reshape(-1).astype(np.uint32) for t in (tables, np.cumsum(tables, axis=1) - tables))
    found = np.empty(len(contexts), np.uint8)
    mask, lowest = np.uint32(TOTAL - 1), np.uint32(LOWEST)
    block, bases = lanes * STEPS, np.zeros(0, np.int64)
    for begin in range(0, len(contexts), lanes):
        if begin % block == 0:
            bases = contexts[begin : begin + block].astype(np.int64) * TOTAL
        base = bases[begin % block : begin % block + lanes]
        x = state[: len(base)]
        slot = x & mask
        index = lookup[base + slot]
        found[begin : begin + lanes] = index  # the low byte is the symbol
        x >>= _PRECISION
        x *= sizes[index]
        x += slot
        x -= starts[index]
        empty = np.flatnonzero(x < lowest)
        require(position + len(empty) <= len(words), "a coded stream ends too early")
        x[empty] = (x[empty] << _SIXTEEN) | words[position : position + len(empty)]
        position += len(empty)
    return found, position


def _lookup(tables: np.ndarray) -> np.ndarray:
    """context · 256 + symbol for each of the 2^14 slots of each context, int32 [contexts · 2^14]."""
    symbols = np.arange(ALPHABET, dtype=np.int32)
    empty = np.zeros(TOTAL, np.int32)
    rows = [np.repeat(symbols + i * ALPHABET, t) if t.any() else empty for i, t in enumerate(tables)]
    return np.concatenate(rows) if rows else empty
