"""States are values: sized, forked, selected, saved, loaded, and refused when they do not fit."""

import pytest
import torch
from laws.cases import CASES
from laws.laws import D_MODEL
from tolerances import assert_trees_close

from fastweight import BlockConfig, Model, ModelConfig, load_state
from fastweight.mixers.delta import DeltaConfig
from fastweight.state import Faults, tensors


def tiny_model(**changes) -> Model:
    torch.manual_seed(0)
    block = BlockConfig(mixer=DeltaConfig(num_heads=2, head_dim=4))
    return Model(ModelConfig(**({"vocab_size": 11, "d_model": 8, "blocks": (block, block)} | changes)))


@pytest.fixture
def read():
    """A model and its state after seven tokens of three sequences."""
    model = tiny_model()
    tokens = torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model, model(tokens)[1]


def test_num_bytes_counts_every_tensor(read):
    _, state = read
    # Per visit and sequence: 2 heads of 4×4 float32, 3 conv inputs of 24 float32, position and two fault counters.
    assert state.num_bytes == 3 * (2 * (2 * 16 * 4 + 3 * 24 * 4 + 3 * 8) + 8)


def test_continuing_a_fork_leaves_the_original_as_it_was(read):
    model, state = read
    before = state.fork()
    with torch.no_grad():
        model(torch.ones(3, 5, dtype=torch.int64), state)
    assert_trees_close(state.visits, before.visits, 0)


def test_a_fork_shares_no_memory(read):
    _, state = read
    fork = state.fork()
    for (_, a), (_, b) in zip(tensors(state.visits), tensors(fork.visits), strict=True):
        assert a.data_ptr() != b.data_ptr()


def test_select_picks_repeats_and_reorders_sequences(read):
    model, state = read
    tokens = torch.randint(0, 11, (3, 4))
    chosen = [2, 0, 2]
    with torch.no_grad():
        want = model(tokens, state)[0][chosen]
        got = model(tokens[chosen], state.select(chosen))[0]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_select_takes_a_mask(read):
    _, state = read
    assert state.select(torch.tensor([True, False, True])).num_sequences == 2


def test_where_restarts_the_other_sequences(read):
    model, state = read
    mixed = state.where(torch.tensor([True, False, True]), model.init_state(3))
    assert mixed.position.tolist() == [7, 0, 7]
    assert_trees_close(mixed.select([1]).visits, model.init_state(1).visits, 0)
    assert_trees_close(mixed.select([0, 2]).visits, state.select([0, 2]).visits, 0)


@pytest.mark.parametrize("rows", [[3], [-1], [0.5], torch.tensor([True, False]), torch.tensor([[0]])])
def test_select_names_the_sequences_that_there_are(read, rows):
    with pytest.raises(ValueError, match="numbers of sequences from 0 to 2, or a mask of 3"):
        read[1].select(rows)


@pytest.mark.parametrize(
    ("keep", "num_sequences"),
    [(torch.tensor([True]), 3), (torch.tensor([1, 0, 1]), 3), (torch.tensor([True, False, True]), 2)],
)
def test_where_needs_one_truth_per_sequence(read, keep, num_sequences):
    model, state = read
    with pytest.raises(ValueError, match="keep must be bool"):
        state.where(keep, model.init_state(num_sequences))


def test_where_refuses_a_state_of_another_model(read):
    other = tiny_model(vocab_size=12).init_state(3)
    with pytest.raises(ValueError, match="of another model"):
        read[1].where(torch.tensor([True, False, True]), other)


def test_detach_cuts_the_graph():
    model = tiny_model()
    _, state = model(torch.ones(1, 3, dtype=torch.int64))
    assert any(t.requires_grad for _, t in tensors(state.visits))
    assert not any(t.requires_grad for _, t in tensors(state.detach().visits))


def test_a_saved_state_comes_back_bit_for_bit_with_its_note(read, tmp_path):
    _, state = read
    state.note["text"] = "seven tokens"
    state.save(tmp_path / "s")
    loaded = load_state(tmp_path / "s")
    assert_trees_close(loaded.visits, state.visits, 0)
    assert torch.equal(loaded.position, state.position)
    assert loaded.note == {"text": "seven tokens"}


def test_a_missing_state_file_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"state\.save"):
        load_state(tmp_path / "nothing")


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_truncated_state_file_is_refused(read, tmp_path, keep):
    read[1].save(tmp_path / "s")
    data = (tmp_path / "s").read_bytes()
    (tmp_path / "s").write_bytes(data[:keep])
    with pytest.raises(ValueError, match="damaged"):
        load_state(tmp_path / "s")


def test_a_flipped_bit_in_a_state_is_found(read, tmp_path):
    read[1].save(tmp_path / "s")
    data = bytearray((tmp_path / "s").read_bytes())
    data[-5] ^= 1
    (tmp_path / "s").write_bytes(data)
    with pytest.raises(ValueError, match="damaged.*checksum"):
        load_state(tmp_path / "s")


def test_a_safetensors_file_that_is_no_state_is_refused(tmp_path):
    tiny_model().save(tmp_path)
    with pytest.raises(ValueError, match="fastweight-model"):
        load_state(tmp_path / "model.safetensors")


def test_an_unknown_state_type_is_named(read, tmp_path):
    read[1].save(tmp_path / "s")
    data = (tmp_path / "s").read_bytes().replace(b"DeltaState", b"EvilsState")
    (tmp_path / "s").write_bytes(data)
    with pytest.raises(ValueError, match="EvilsState"):
        load_state(tmp_path / "s")


def test_a_state_of_another_model_is_refused(read):
    other = tiny_model(vocab_size=12)
    with pytest.raises(ValueError, match="belongs to another model"):
        other(torch.ones(3, 1, dtype=torch.int64), read[1])


def test_a_state_of_another_batch_size_is_refused(read):
    model, state = read
    with pytest.raises(ValueError, match="3 sequences, the input 2"):
        model(torch.ones(2, 1, dtype=torch.int64), state)


def test_saving_over_a_state_keeps_it_when_the_disk_is_full(read, tmp_path, monkeypatch):
    _, state = read
    state.save(tmp_path / "s")
    before = (tmp_path / "s").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastweight.tensor_files.save_file", full)
    with pytest.raises(OSError, match="is untouched"):
        state.save(tmp_path / "s")
    assert (tmp_path / "s").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_a_place_where_no_file_can_be_made_is_named(read, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="could not write .*file/s.*Choose a place"):
        read[1].save(tmp_path / "file" / "s")


def test_faults_remember_the_first_position():
    faults = Faults.none(2).add(torch.tensor([0, 2]), torch.tensor([99, 5]))
    faults = faults.add(torch.tensor([1, 1]), torch.tensor([8, 9]))
    assert faults.count.tolist() == [1, 3]
    assert faults.first.tolist() == [8, 5]


def test_rows_that_start_anew_take_the_dtypes_of_those_that_go_on(read):
    model, state = read
    narrow = state._map(lambda t: t.bfloat16() if t.is_floating_point() else t)
    started = narrow.where(torch.tensor([True, False, True]), model.init_state(3))
    assert [t.dtype for _, t in tensors(started.visits)] == [t.dtype for _, t in tensors(narrow.visits)]


@pytest.mark.parametrize("case", CASES)
def test_a_state_that_has_read_nothing_can_be_saved_and_owns_its_numbers(case, tmp_path):
    block = BlockConfig(mixer=CASES[case])
    torch.manual_seed(0)
    model = Model(ModelConfig(vocab_size=11, d_model=D_MODEL, blocks=(block,)))
    state = model.init_state(2)
    state.save(tmp_path / "state")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert_trees_close(state.visits, load_state(tmp_path / "state").visits, 0)
