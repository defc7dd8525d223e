"""The cache: continuing, reordering, repeating, selecting, cropping."""

import copy

import pytest
import torch
from hf.faces import KINDS, face_of, ids_of
from tolerances import OUTPUT, assert_close

from fastweight.hf import FastweightCache

every_kind = pytest.mark.parametrize("kind", KINDS)
TOLERANCE = OUTPUT[torch.float64]


@every_kind
def test_continuing_from_the_cache_equals_one_forward(kind):
    face, ids = face_of(kind, torch.float64), ids_of(2, 17)
    cache, parts = FastweightCache(), []
    for piece in ids.split([1, 6, 3, 7], 1):
        parts.append(face(piece, past_key_values=cache).logits)
    assert_close(torch.cat(parts, 1), face(ids).logits, TOLERANCE)
    assert cache.get_seq_length() == 17


@every_kind
def test_continuing_a_padded_batch_equals_one_forward(kind):
    face, ids = face_of(kind, torch.float64), ids_of(3, 10)
    # Row 2 begins after the first cut, row 1 ends before it: rows are missing from either piece.
    mask = torch.tensor(
        [[0, 1, 1, 0, 1, 1, 1, 1, 0, 1], [1, 1, 1, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]]
    )
    cache = FastweightCache()
    first = face(ids[:, :4], attention_mask=mask[:, :4], past_key_values=cache).logits
    second = face(ids[:, 4:], attention_mask=mask, past_key_values=cache).logits
    assert_close(torch.cat([first, second], 1), face(ids, attention_mask=mask).logits, TOLERANCE)


def test_a_packed_row_leaves_one_sequence_per_document_in_the_cache():
    face, ids, more = face_of("hybrid", torch.float64), ids_of(1, 9), ids_of(2, 3, seed=2)
    cache = face(ids, cu_seqlens=torch.tensor([0, 4, 9]), use_cache=True).past_key_values
    got = face(more, past_key_values=cache).logits
    for row, document in enumerate(ids[0].split([4, 5])):
        assert_close(got[row], face(torch.cat([document, more[row]])[None]).logits[0, -3:], TOLERANCE)


CHANGES = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    "mask": (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
}


@every_kind
@pytest.mark.parametrize("change", CHANGES)
def test_rows_of_the_cache_move_as_a_whole(kind, change):
    face, ids = face_of(kind, torch.float64), ids_of(3, 8)
    apply, rows = CHANGES[change]
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[1, :3] = 0
    cache = face(ids, attention_mask=mask, use_cache=True).past_key_values
    apply(cache)
    more = ids_of(len(rows), 3, seed=3)
    full = torch.cat([mask[rows], torch.ones_like(more)], 1)
    want = face(torch.cat([ids[rows], more], 1), attention_mask=full).logits[:, -3:]
    assert_close(face(more, attention_mask=full, past_key_values=cache).logits, want, TOLERANCE)


@pytest.mark.parametrize("copied", [FastweightCache.fork, copy.deepcopy])
def test_a_copy_of_the_cache_continues_on_its_own(copied):
    face, ids = face_of("hybrid"), ids_of(2, 8)
    cache = face(ids, use_cache=True).past_key_values
    other = copied(cache)
    face(ids_of(2, 5, seed=4), past_key_values=other)
    assert (cache.get_seq_length(), other.get_seq_length()) == (8, 13)
    assert cache.state.position.tolist() == [8, 8]


def test_a_call_without_use_cache_leaves_the_given_cache_alone():
    face, ids = face_of("hybrid"), ids_of(2, 8)
    cache = face(ids, use_cache=True).past_key_values
    assert face(ids, past_key_values=cache, use_cache=False).past_key_values is None
    assert cache.get_seq_length() == 8


def test_training_keeps_no_state_unless_asked():
    face, ids = face_of("hybrid").train(), ids_of(2, 8)
    assert face(ids).past_key_values is None
    assert face(ids, use_cache=True).past_key_values.get_seq_length() == 8


@pytest.mark.parametrize("amount", [-3, 5])
def test_cropping_full_attention_equals_never_having_read_it(amount):
    face, ids, more = face_of("attention", torch.float64), ids_of(2, 8), ids_of(2, 4, seed=5)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, :2] = 0
    cache = face(ids, attention_mask=mask, use_cache=True).past_key_values
    cache.crop(amount)
    assert cache.get_seq_length() == 5
    full = torch.cat([mask[:, :5], torch.ones_like(more)], 1)
    want = face(torch.cat([ids[:, :5], more], 1), attention_mask=full).logits[:, 5:]
    assert_close(face(more, attention_mask=full, past_key_values=cache).logits, want, TOLERANCE)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "attention"])
def test_cropping_a_memory_or_a_window_is_refused(kind):
    cache = face_of(kind)(ids_of(2, 8), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"cannot forget its last 2 token.*cache.fork"):
        cache.crop(-2)


def test_cropping_columns_with_padding_is_refused():
    mask = torch.tensor([[1, 1, 1, 0, 1, 1]])
    cache = face_of("attention")(ids_of(1, 6), attention_mask=mask, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="only the last 2 column"):
        cache.crop(-3)


@every_kind
def test_cropping_everything_starts_anew(kind):
    face, ids = face_of(kind), ids_of(2, 8)
    cache = face(ids, use_cache=True).past_key_values
    cache.crop(-8)
    assert torch.equal(face(ids, past_key_values=cache).logits, face(ids).logits)


def test_a_cache_of_another_model_is_refused():
    cache = face_of("delta")(ids_of(1, 4), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="belongs to another model"):
        face_of("lact")(ids_of(1, 4), past_key_values=cache)


def test_a_foreign_cache_is_refused():
    from transformers import DynamicCache

    with pytest.raises(ValueError, match="must be a FastweightCache, got DynamicCache"):
        face_of("delta")(ids_of(1, 4), past_key_values=DynamicCache())
