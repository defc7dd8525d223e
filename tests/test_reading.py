"""Whole models of every tiny preset in use: rows at different positions, faults in one row, memory that stays small."""

from typing import NamedTuple

import pytest
import torch
from tolerances import GRADIENT, OUTPUT, assert_close, assert_trees_close
from torch import Tensor

from fastweight import Model, load_state
from fastweight.presets import TINY
from fastweight.state import ModelState, tensors

PREFIXES, MORE = (5, 70, 131), (3, 66, 1)  # before, at and beyond the chunks and windows of 16 and 64
BROKEN = 256  # the token whose embedding is not finite
presets = pytest.mark.parametrize("name", TINY)


def preset(name: str, **changes) -> Model:
    """Weights moved off their initial values, so that nothing is hidden by a zero."""
    torch.manual_seed(0)
    model = Model.from_preset(f"tiny-{name}", **({"init_std": 0.1} | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def offsets(lengths) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


class Read(NamedTuple):
    """A float64 model, three histories, and its state after reading them packed."""

    model: Model
    histories: tuple[Tensor, ...]
    state: ModelState


@pytest.fixture(scope="module", params=list(TINY))
def read(request) -> Read:
    model = preset(request.param).double()
    histories = tokens(1, sum(PREFIXES)).split(PREFIXES, 1)
    with torch.no_grad():
        _, state = model(torch.cat(histories, 1), cu_seqlens=offsets(PREFIXES))
    return Read(model, histories, state)


@torch.no_grad()
def test_rows_at_different_positions_read_on_as_if_alone(read):
    rows = tokens(3, 75, seed=2)
    got, state = read.model(rows, read.state)
    for n, history in enumerate(read.histories):
        want, alone = read.model(torch.cat([history, rows[n : n + 1]], 1))
        assert_close(got[n], want[0, history.shape[1] :], OUTPUT[torch.float64])
        assert state.position[n] == alone.position[0]


@torch.no_grad()
def test_a_state_saved_inside_a_chunk_reads_on_packed(read, tmp_path):
    read.state.save(tmp_path / "state")
    pieces = tokens(1, sum(MORE), seed=3).split(MORE, 1)
    got, _ = read.model(torch.cat(pieces, 1), load_state(tmp_path / "state"), cu_seqlens=offsets(MORE))
    for history, piece, y in zip(read.histories, pieces, got.split(MORE, 1), strict=True):
        want, _ = read.model(torch.cat([history, piece], 1))
        assert_close(y, want[:, history.shape[1] :], OUTPUT[torch.float64])


@torch.no_grad()
def test_rows_of_two_states_mix_whatever_the_lengths_of_their_caches(read):
    fresh, keep = read.model.init_state(3), torch.tensor([True, False, True])
    mixed = read.state.where(keep, fresh)
    assert_trees_close(mixed.visits, fresh.where(~keep, read.state).visits, 0)
    rows = tokens(3, 70, seed=4)
    got, _ = read.model(rows, mixed)
    assert_close(got[1:2], read.model(rows[1:2])[0], OUTPUT[torch.float64])
    assert_close(got[[0, 2]], read.model(rows, read.state)[0][[0, 2]], OUTPUT[torch.float64])
    again, _ = read.model(rows[[1, 1, 0]], mixed.select([1, 1, 0]))
    assert_close(again, got[[1, 1, 0]], OUTPUT[torch.float64])


def test_a_state_in_float32_serves_the_same_model_in_float64(read):
    narrow = read.state._map(lambda t: t.float() if t.is_floating_point() else t)
    rows = tokens(3, 40, seed=5)
    with torch.no_grad():
        got, want = (read.model(rows, state)[0] for state in (narrow, read.state))
    assert_close(got, want, 1e-4)  # float32 rounding of the state, grown by 40 tokens of reading


@presets
@torch.no_grad()
def test_decoding_holds_no_more_memory_than_the_state_counts(name):
    """A state that is a view of something longer would keep all that was read alive."""
    model, rows = preset(name), tokens(1, 300)

    def held(state: ModelState) -> int:
        stores = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for _, t in tensors(state.visits)}
        return sum(stores.values())

    _, state = model(rows)
    after_reading = state.num_bytes
    assert held(state) <= after_reading
    for t in range(20):
        _, state = model(rows[:, t : t + 1], state)
    grows = any(getattr(block.mixer, "window", 0) is None for block in model.config.blocks)
    assert (state.num_bytes > after_reading) == grows
    assert held(state) <= 1.02 * state.num_bytes + 8000  # a tail of the last convolution inputs is cut from one more


@presets
def test_checkpointing_changes_no_gradient_in_packed_recurrent_bfloat16_training(name):
    order = {"order": (0, 1, 2, 1)} if len(TINY[name][0]().blocks) == 3 else {}
    gradients = []
    for on in (False, True):
        model = preset(name, **order)
        model.checkpointing = on
        with torch.autocast("cpu", torch.bfloat16):
            first, state = model(tokens(1, 139), cu_seqlens=offsets((5, 70, 64)))
            second, _ = model(tokens(1, 139, seed=2), state, cu_seqlens=offsets((5, 70, 64)))
        (first.float().square().mean() + second.float().square().mean()).backward()
        gradients.append([p.grad for p in model.parameters()])
    for got, want in zip(*gradients, strict=True):
        assert_close(got, want, GRADIENT[torch.float32])


@pytest.fixture(scope="module", params=list(TINY))
def broken(request) -> Model:
    """A model in which one token's embedding is NaN."""
    model = preset(request.param, tie_embeddings=False)
    with torch.no_grad():
        model.embedding.weight[BROKEN] = torch.nan
    return model


@torch.no_grad()
def test_a_row_that_is_not_finite_leaves_the_other_rows_as_they_are(broken):
    clean = tokens(3, 150)
    damaged = clean.clone()
    damaged[1, 20] = BROKEN
    others = torch.tensor([0, 2])
    want, got = broken(clean)[0], broken(damaged)[0]
    assert torch.equal(got[others], want[others])
    assert not got[1, 20].isfinite().any()


@torch.no_grad()
def test_a_packed_document_that_is_not_finite_leaves_the_others_as_they_are(broken):
    clean, ends = tokens(1, 193), torch.tensor([0, 50, 150, 193])
    damaged = clean.clone()
    damaged[0, 70] = BROKEN
    want, got = (broken(row, cu_seqlens=ends)[0] for row in (clean, damaged))
    assert torch.equal(got[:, :50], want[:, :50])
    assert torch.equal(got[:, 150:], want[:, 150:])


@torch.no_grad()
def test_every_memory_that_met_something_not_finite_says_so(broken):
    rows = tokens(2, 150)
    rows[1, 20] = BROKEN
    found = broken.describe_faults(broken(rows)[1])
    learning = [i for i, block in enumerate(broken.config.visits) if broken.mixers()[block].learns]
    assert [int(line.split()[1]) for line in found] == learning
    assert all("of sequence 1 were not finite and were skipped" in line for line in found)


@torch.no_grad()
def test_memories_stay_finite_where_they_skipped_an_update(broken):
    rows = tokens(2, 150)
    rows[1, 20] = BROKEN
    _, state = broken(rows)
    memories = [t for name, t in tensors(state.visits) if "memory" in name or "weights" in name]
    assert all(memory.isfinite().all() for memory in memories)
