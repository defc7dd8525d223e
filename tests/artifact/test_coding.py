"""Entropy coding: every array comes back, close to its entropy, and damaged streams are refused."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastweight.artifact import coders, entropy, rans, tables
from fastweight.artifact.entropy import Part


def normal_symbols(rows: int, columns: int, width: float = 2.4, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((rows, columns)) * width
    return np.clip(np.rint(values), -31, 31).astype(np.int16).__add__(31).astype(np.uint8)


def there_and_back(parts: list[Part], coder_names=("rans", "raw", "brotli", "zstd")) -> list[np.ndarray]:
    record, data = entropy.encode(parts, coder_names)
    return entropy.decode(data, record, [p.symbols.shape for p in parts], [p.classes for p in parts])


EDGES = {
    "empty": np.zeros((0, 7), np.uint8),
    "no columns": np.zeros((3, 0), np.uint8),
    "one": np.array([[200]], np.uint8),
    "single symbol": np.full((33, 100), 255, np.uint8),
    "first symbol": np.zeros((33, 100), np.uint8),
    "all symbols once": np.arange(256, dtype=np.uint8)[None],
    "all symbols": np.random.default_rng(0).integers(0, 256, (300, 257)).astype(np.uint8),
    "16 symbols": np.random.default_rng(1).integers(0, 16, (100, 63)).astype(np.uint8),
    "a rare one": np.where(np.arange(70_000) == 12_345, 9, 3).astype(np.uint8)[None],
    "two": np.array([[0, 255]], np.uint8),
}


@pytest.mark.parametrize("coder", ["rans", "brotli", "zstd", "raw"])
@pytest.mark.parametrize("edge", EDGES)
def test_golf_p11_edge_histograms_come_back_from_every_coder(edge, coder):
    found = there_and_back([Part(EDGES[edge])], (coder,))
    assert np.array_equal(found[0], EDGES[edge])


def test_golf_p11_parts_of_all_kinds_share_one_section():
    parts = [Part(symbols) for symbols in EDGES.values()]
    for part, again in zip(parts, there_and_back(parts), strict=True):
        assert np.array_equal(again, part.symbols)
    assert there_and_back([]) == []


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 255), min_size=1, max_size=12),
    st.integers(0, 3000),
    st.integers(0, 2**32 - 1),
    st.floats(0.05, 30),
)
def test_golf_p11_any_symbols_come_back_from_rans(alphabet, length, seed, sharpness):
    rng = np.random.default_rng(seed)
    weights = np.exp(-np.arange(len(alphabet)) * sharpness)
    symbols = rng.choice(np.array(alphabet, np.uint8), length, p=weights / weights.sum())
    found = there_and_back([Part(symbols[None])], ("rans",))
    assert np.array_equal(found[0][0], symbols)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(1, 50), st.integers(0, 2**32 - 1))
def test_golf_p11_rows_of_several_classes_come_back_from_rans(rows, columns, seed):
    rng = np.random.default_rng(seed)
    classes = entropy.row_classes(rng.random(rows).astype(np.float16))
    part = Part(rng.integers(0, 1 + 20 * (1 + classes[:, None]), (rows, columns)).astype(np.uint8), classes)
    assert np.array_equal(there_and_back([part], ("rans",))[0], part.symbols)


@pytest.mark.parametrize("size", [1, 16_383, 16_384, 32_769, 100_003])
def test_streams_that_do_not_fill_their_lanes_come_back(size):
    symbols = normal_symbols(1, size)
    assert np.array_equal(there_and_back([Part(symbols)], ("rans",))[0], symbols)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 10**9), min_size=256, max_size=256))
def test_frequencies_sum_to_2_to_the_14_and_none_that_occurs_is_0(counts):
    counts = np.array(counts)
    table = tables.frequencies(counts)
    assert table.sum() == (1 << 14 if counts.any() else 0)
    assert np.array_equal(table > 0, counts > 0)
    assert np.array_equal(tables.from_bytes(tables.to_bytes(table), 1)[0], table)


@pytest.mark.parametrize("width", [0.6, 1.0, 2.4, 10.0])
def test_golf_p11_rans_is_within_a_fifth_of_a_percent_of_the_entropy(width):
    symbols = normal_symbols(1024, 1024, width)
    share = np.bincount(symbols.reshape(-1)) / symbols.size
    best = -sum(p * math.log2(p) for p in share if p > 0) * symbols.size / 8
    _, data = entropy.encode([Part(symbols)], ("rans",))
    assert best <= len(data) <= 1.002 * best


def test_rans_beats_brotli_and_zstd_on_quantised_noise():
    symbols = normal_symbols(256, 512)
    sizes = {name: len(entropy.encode([Part(symbols)], (name,))[1]) for name in ("rans", "brotli", "zstd")}
    assert sizes["rans"] < 0.99 * min(sizes["brotli"], sizes["zstd"])


@pytest.mark.parametrize("rows", [20, 4000])  # tried whole, and on a sample first
def test_what_repeats_goes_to_a_coder_that_sees_it(rows):
    symbols = np.tile(normal_symbols(1, 100), (rows, 1))
    assert entropy.choose(Part(symbols)).coder in ("brotli", "zstd")


def test_classes_are_used_where_rows_differ_and_not_where_they_are_alike():
    classes = entropy.row_classes(np.arange(64, dtype=np.float16))
    alike = normal_symbols(64, 2000)
    differ = np.concatenate([normal_symbols(8, 2000, 0.5 * (1 + i)) for i in range(8)])
    assert entropy.choose(Part(alike, classes), ("rans",)).num_classes == 1
    assert entropy.choose(Part(differ, classes), ("rans",)).num_classes == 8


def test_classes_are_equal_groups_of_rows_by_scale():
    scales = np.array([5, 1, 3, 3, 2, 8, 9, 7, 0, 4, 6, 1, 1, 1, 1, 1], np.float16)
    classes = entropy.row_classes(scales)
    assert np.bincount(classes).tolist() == [2] * 8
    assert all(a <= b for a, b in zip(classes[np.argsort(scales, kind="stable")], sorted(classes)))


def coded_stream() -> tuple[bytes, np.ndarray, np.ndarray]:
    symbols = normal_symbols(1, 20_000)[0]
    made = tables.frequencies(np.bincount(symbols, minlength=256))[None]
    contexts = np.zeros(len(symbols), np.int32)
    return rans.encode(symbols, contexts, made), contexts, made


@pytest.mark.parametrize("cut", [-2, 2, 4, 1000])
def test_a_stream_with_missing_or_further_words_is_refused(cut):
    data, contexts, made = coded_stream()
    with pytest.raises(ValueError, match="coded stream"):
        rans.decode(data[:-cut] if cut > 0 else data + b"ab", contexts, made)


def test_a_stream_with_a_changed_bit_does_not_end_where_it_must():
    data, contexts, made = coded_stream()
    for place in (1, 5, len(data) // 2, len(data) - 1):
        changed = bytearray(data)
        changed[place] ^= 4
        with pytest.raises(ValueError, match="coded stream"):
            rans.decode(bytes(changed), contexts, made)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "end too early"),
        (bytes([250, 9]) + bytes(10), "past symbol 255"),
        (bytes([0, 0, 5]), "sum to 5"),
        (bytes([0, 0, 0x80, 0x80, 0x80, 0x80]), "cut off or too large"),
        (tables.to_bytes(tables.frequencies(np.eye(256, dtype=int)[3])) + b"x", "bytes after the last"),
    ],
)
def test_bytes_that_are_no_tables_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        tables.from_bytes(data, 1)


@pytest.mark.parametrize("coder", ["brotli", "zstd"])
def test_a_part_that_unpacks_to_more_than_announced_is_refused_before_it_does(coder):
    bomb = coders.compress(coder, bytes(50_000_000))
    with pytest.raises(ValueError, match="announce"):
        coders.decompress(coder, bomb, 1000)


@pytest.mark.parametrize("coder", ["brotli", "zstd", "raw"])
def test_a_part_that_is_cut_short_is_refused(coder):
    data = coders.compress(coder, b"some text that is some text" * 20)
    with pytest.raises(ValueError, match=coder):
        coders.decompress(coder, data[:-3], 540)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": []}, "must have 1 parts"),
        ({"parts": [["rans", 3]]}, "cannot have 3 classes"),
        ({"parts": [["lzma", 3]]}, "unknown coder 'lzma'"),
        ({"parts": [["raw", -1]]}, "negative"),
        ({"parts": [["raw", True]]}, "damaged"),
        ({"stream": 10**12}, "its parts need"),
        ({"tables": "x"}, "no number"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(change, message):
    record, data = entropy.encode([Part(normal_symbols(9, 9))], ("rans",))
    with pytest.raises(ValueError, match=message):
        entropy.decode(data, record | change, [(9, 9)], [None])
