"""Codecs: how far they are off, how many bytes they take, and that nothing is lost for good."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastweight.diloco.codecs import CHUNK, KEPT, Feedback, codec
from fastweight.diloco.seals import pack

SIZES = [1, 31, 100, 4096, 4097, 12289]
# Bits per entry with the scales: int8 8 + 32/128, int4 4 + 16/32, topk2 82 (12 + 2) / 4096 + two magnitudes.
BITS = {"fp32": 32, "bf16": 16, "int8": 8.25, "int4": 4.5, "topk2": (KEPT * 12 + 84 * 2 + 64) / CHUNK}


def vector(size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 1e-3


def again(name, x):
    return codec(name).decode(codec(name).encode(x), x.numel())


@pytest.mark.parametrize("size", SIZES)
def test_fp32_changes_nothing(size):
    assert torch.equal(again("fp32", vector(size)), vector(size))


@pytest.mark.parametrize("size", SIZES)
def test_bf16_is_off_by_at_most_a_256th(size):
    x = vector(size)
    assert ((again("bf16", x) - x).abs() <= x.abs() / 256).all()


# Half a step of a block's scale, and for int4 the rounding of the scale to 8 bits, at most seven times.
@pytest.mark.parametrize(("name", "block", "bound"), [("int8", 128, 0.5 / 127), ("int4", 32, 0.5 / 7 + 1 / 256)])
@pytest.mark.parametrize("size", SIZES)
def test_whole_numbers_are_off_by_at_most_half_a_step_of_their_block(name, block, bound, size):
    x = vector(size)
    for start in range(0, size, block):
        part, got = x[start : start + block], again(name, x)[start : start + block]
        assert (got - part).abs().max() <= part.abs().max() * bound * 1.001


def test_the_sparse_codec_keeps_the_largest_entries_with_their_signs():
    x = vector(2 * CHUNK)
    got = again("topk2", x)
    for half in range(2):
        part, out = x[half * CHUNK : (half + 1) * CHUNK], got[half * CHUNK : (half + 1) * CHUNK]
        kept = out.nonzero().flatten()
        assert set(kept.tolist()) == set(part.abs().argsort(descending=True)[:KEPT].tolist())
        assert torch.equal(out[kept].sign(), part[kept].sign())
        assert len(out.abs().unique()) == 3  # 0 and two magnitudes


def test_the_sparse_codec_sends_what_has_few_entries_nearly_exactly():
    x = torch.zeros(5000)
    x[[3, 4095, 4096, 4999]] = torch.tensor([1.0, -1.0, 2.0, 2.0])
    got = again("topk2", x)
    assert torch.equal(got.nonzero(), x.nonzero()) or got.abs().max() <= 2.0
    assert torch.equal(got.sign()[[3, 4095, 4096, 4999]], x.sign()[[3, 4095, 4096, 4999]])


@pytest.mark.parametrize("name", BITS)
def test_a_code_has_the_size_that_the_documentation_says(name):
    size = 50 * CHUNK
    assert len(pack(codec(name).encode(vector(size)))) == pytest.approx(size * BITS[name] / 8, abs=300)


@pytest.mark.parametrize("name", ["bf16", "int8", "int4", "topk2"])
def test_what_was_lost_is_sent_later(name):
    # Sent so far + what is left = given so far: nothing disappears (the sum telescopes).
    feedback, given_, sent = Feedback(name), torch.zeros(5000), torch.zeros(5000)
    for seed in range(20):
        x = vector(5000, seed)
        given_, sent = given_ + x, sent + codec(name).decode(feedback.encode(x), 5000)
    torch.testing.assert_close(sent + feedback.left, given_, rtol=1e-5, atol=1e-7)


def test_a_constant_gradient_arrives_in_full_after_a_while_through_the_sparse_codec():
    x, feedback, sent = vector(CHUNK), Feedback("topk2"), torch.zeros(CHUNK)
    for _ in range(400):
        sent = sent + codec("topk2").decode(feedback.encode(x), CHUNK)
    large = x.abs() > x.abs().median()
    assert ((sent / 400 - x).abs()[large] < 0.5 * x.abs()[large]).all()


def test_decayed_feedback_carries_that_part():
    x, feedback = vector(300), Feedback("int4", decay=0.5)
    lost = x - codec("int4").decode(feedback.encode(x), 300)
    torch.testing.assert_close(feedback.left, lost * 0.5)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["bf16", "int8", "int4", "topk2"]),
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=300),
)
def test_any_finite_vector_stays_finite_and_keeps_its_length(name, values):
    x = torch.tensor(values)
    got = again(name, x)
    assert got.shape == x.shape
    assert got.isfinite().all()


@pytest.mark.parametrize("name", ["fp32", "bf16", "int8", "int4", "topk2"])
def test_a_code_of_another_length_is_refused(name):
    with pytest.raises(ValueError, match="code: .* must be"):
        codec(name).decode(codec(name).encode(vector(9000)), 400)


def test_a_part_that_is_missing_is_named():
    with pytest.raises(ValueError, match="scale must be .* got nothing"):
        codec("int8").decode({"values": torch.zeros(128, dtype=torch.int8)}, 128)


def test_an_unknown_codec_is_refused_with_near_names():
    with pytest.raises(ValueError, match="int4, int8|int8, int4"):
        codec("int6")
