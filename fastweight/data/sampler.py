"""Which item is sample number n? A pure function of (n, seed), so the position in a run is one integer.

A keyed permutation of 0..N-1 replaces the shuffled list: nothing to store, nothing to replay, any entry in O(1). Built
as a balanced Feistel network on the smallest even number of bits that holds N, with cycle walking for the values
beyond N (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", section 4).
"""

import dataclasses

import numpy as np

_ROUNDS = 8
_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def permute(index: np.ndarray | int, num_items: int, key: int) -> np.ndarray:
    """Return where `key`'s permutation of range(num_items) sends each entry of `index`, as int64 of the same shape.

    Raises ValueError if an index lies outside range(num_items).
    """
    index = np.asarray(index, dtype=np.int64)
    if num_items < 1:
        raise ValueError(f"permute: num_items must be at least 1, got {num_items}.")
    if index.size and (index.min() < 0 or index.max() >= num_items):
        raise ValueError(f"permute: indices must lie in 0..{num_items - 1}, got {index.min()}..{index.max()}.")
    half_bits = max(1, (int(num_items - 1).bit_length() + 1) // 2)
    round_keys = [_mix(key + (r + 1) * _GOLDEN) for r in range(_ROUNDS)]
    values = _feistel(index.astype(np.uint64).reshape(-1), half_bits, round_keys)
    outside = np.flatnonzero(values >= num_items)
    while outside.size:
        values[outside] = _feistel(values[outside], half_bits, round_keys)
        outside = outside[values[outside] >= num_items]
    return values.astype(np.int64).reshape(index.shape)


def _feistel(values: np.ndarray, half_bits: int, round_keys: list[int]) -> np.ndarray:
    mask, shift = np.uint64((1 << half_bits) - 1), np.uint64(half_bits)
    left, right = values >> shift, values & mask
    for round_key in round_keys:
        left, right = right, left ^ (_mix_array(right ^ np.uint64(round_key)) & mask)
    return (left << shift) | right


def derive_seed(*parts: int) -> int:
    """Return a 64-bit seed that depends on every part and on their order."""
    seed = 0
    for part in parts:
        seed = _mix(seed + _GOLDEN + _mix(part))
    return seed


def _mix(x: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators")."""
    x &= _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _mix_array(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Sample number -> (epoch, item): every epoch visits each of `num_samples` items once, in an order of its own."""

    num_samples: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"Sampler: num_samples must be at least 1, got {self.num_samples}.")

    def locate(self, sample_numbers: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
        """Return epoch and item, each int64 of the shape of `sample_numbers` (0, 1, 2, ... without end)."""
        numbers = np.asarray(sample_numbers, dtype=np.int64)
        if numbers.size and numbers.min() < 0:
            raise ValueError(f"Sampler: sample numbers start at 0, got {numbers.min()}.")
        epochs, places = numbers // self.num_samples, numbers % self.num_samples
        items = np.empty_like(places)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            items[chosen] = permute(places[chosen], self.num_samples, derive_seed(self.seed, int(epoch)))
        return epochs, items
