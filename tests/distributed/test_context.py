"""Sequences cut over processes: what they compute is what one process computes, and what cannot be cut is refused."""

import dataclasses
import json
import shutil

import pytest
import torch
from distributed import cut_cases, runs
from distributed.cut_cases import make_batch
from distributed.test_equality import TOLERANCE, assert_same_run
from tolerances import GRADIENT, OUTPUT
from training_cases import tiny_config, tiny_model

from fastweight import Model
from fastweight.distributed import handover
from fastweight.distributed.context import Context
from fastweight.distributed.handover import Line, Spec, pack, unpack
from fastweight.distributed.mesh import MeshConfig
from fastweight.distributed.team import Team
from fastweight.mixers import mixer_kinds
from fastweight.train import read_metrics, train
from fastweight.train.prepare import check_team

LIMITS = {"features": OUTPUT[torch.float64], "state": OUTPUT[torch.float64], "gradients": GRADIENT[torch.float64]}


def assert_equal_everywhere(folder, processes: int, names: list[str]) -> None:
    """The errors that all processes have written lie within the tolerances of float64; all cases are there."""
    for rank in range(processes):
        found = json.loads((folder / f"{rank}.json").read_text())
        assert set(found) == {f"{name} {way}" for name in names for way in ("rows", "packed")}
        for case, errors in found.items():
            for what, error in errors.items():
                assert error <= LIMITS[what], (case, what, rank, error)


def context(part: int, parts: int, turns: int = 1) -> Context:
    """One of `parts` processes that are not there."""
    made = Context(turns=turns)
    made.part, made.parts = part, parts
    return made


def test_every_kind_of_mixer_is_among_the_cases():
    assert {config.kind for config in cut_cases.CASES.values()} == set(mixer_kinds())


def test_two_processes_compute_what_one_computes_with_every_layer_and_preset(cut_by_two):
    assert_equal_everywhere(cut_by_two / "cases", 2, [*cut_cases.CASES, *cut_cases.PRESETS, "looped"])


@pytest.mark.parametrize("turns", [1, 2])
def test_four_processes_compute_what_one_computes(turns, cut_by_four):
    assert_equal_everywhere(cut_by_four / f"turns-{turns}", 4, cut_cases.FEW[turns])


@pytest.mark.parametrize("name", runs.CUT)
def test_two_halves_of_every_sequence_learn_what_one_process_learns(name, cut_by_two, alone):
    assert_same_run(cut_by_two / name, alone(name))


def test_compiled_blocks_hand_on_the_same_states(cut_by_two, alone):
    assert_same_run(cut_by_two / "compiled", alone("lact"))


@pytest.mark.parametrize("name", ["lact", "packed", "looped"])
def test_four_processes_with_turns_replicas_or_shards_learn_what_one_learns(name, cut_by_four, alone):
    assert_same_run(cut_by_four / name, alone(name))


def test_processes_that_share_sequences_go_on_where_others_stopped(cut_by_two, cut_by_four, alone):
    assert_same_run(cut_by_two / "alone-muon", alone("muon"))
    assert_same_run(cut_by_four / "two-muon", alone("muon"))


def test_one_process_goes_on_where_two_halves_stopped(cut_by_two, alone, store, tmp_path):
    out = shutil.copytree(cut_by_two / "muon", tmp_path / "muon")
    train(runs.run_config(store, "muon"), out, resume="step-000008", quiet=True)
    assert_same_run(out, alone("muon"))


def test_held_out_losses_are_those_of_one_process(cut_by_two, alone):
    for kind in ("raw", "after"):
        (mine,), (theirs,) = (read_metrics(out, kind) for out in (cut_by_two / "muon", alone("muon")))
        assert mine["loss_nats"] == pytest.approx(theirs["loss_nats"], rel=TOLERANCE)


def test_copies_of_weights_are_written_once(cut_by_two):
    folder = cut_by_two / "muon" / "checkpoints" / "step-000016"
    first, second = sorted(path.stat().st_size for path in folder.glob("part-*.safetensors"))
    assert first < 200 < second


def test_heads_for_tokens_beyond_the_cut_are_refused():
    team = Team(0, 2)
    team.context = context(0, 2)
    model = Model(dataclasses.replace(tiny_model().config, tokens_ahead=2))
    with pytest.raises(ValueError, match="predicts 2 tokens at each position.*beyond a cut"):
        check_team(model, tiny_config("store"), team)


@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_the_pieces_of_all_processes_are_the_batch(packed, turns):
    batch = make_batch(packed)
    slices = [context(part, 3, turns).cut(batch) for part in range(3)]
    pieces = [(part, piece) for turn in range(turns) for part in slices for piece in [part.pieces[turn]]]
    for name in ("tokens", "targets", "target_bytes", "weights"):
        joined = torch.cat([getattr(part.batch, name)[:, p.start : p.stop] for part, p in pieces], 1)
        assert torch.equal(joined, getattr(batch, name))
    assert not pieces[0][1].receives
    assert not pieces[-1][1].sends
    assert [p.sends for _, p in pieces[:-1]] == [p.receives for _, p in pieces[1:]]


def test_a_document_that_ends_at_the_cut_is_not_handed_on():
    batch = make_batch(packed=True)
    ends = torch.tensor([0, 25, 30, 75], dtype=torch.int32)
    batch = type(batch)(tokens=batch.tokens, targets=batch.targets, target_bytes=batch.target_bytes, cu_seqlens=ends)
    first, second, third = (context(part, 3).cut(batch).pieces[0] for part in range(3))
    assert (first.sends, second.receives, second.sends, third.receives) == (False, False, True, True)
    assert (second.position.tolist(), third.position.tolist()) == ([0, 0], [20])
    assert second.cu_seqlens is not None
    assert second.cu_seqlens.tolist() == [0, 5, 25]


def test_a_message_holds_tensors_of_any_dtype():
    sent = [torch.ones(3, dtype=torch.bool), torch.randn(2, 3).bfloat16(), torch.zeros(2, 0), torch.arange(5)]
    got = unpack(pack(sent), [Spec(t.dtype, t.shape) for t in sent])
    for mine, theirs in zip(got, sent, strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


def test_a_state_that_no_header_can_describe_is_refused(monkeypatch):
    monkeypatch.setattr(handover, "HEADER_BYTES", 64)
    x = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match=r"description of a state takes \d+ bytes, a header has 64"):
        handover.send_state(Line(0, 1), x, (x, x))


@pytest.mark.parametrize(
    ("mesh", "processes", "message"),
    [
        ({"context": 2}, 3, r"replicate 1 × shard any × context 2 needs 2 processes, there are 3"),
        ({"context": 2, "shard": 2}, 2, r"shard 2 × context 2 needs 4 processes, .* mesh.context"),
    ],
)
def test_a_mesh_of_another_size_than_the_processes_is_refused(mesh, processes, message):
    assert not MeshConfig(**mesh).fits(processes)
    with pytest.raises(ValueError, match=message):
        MeshConfig(**mesh).sizes(processes)


def test_processes_that_are_left_share_the_weights():
    assert MeshConfig(replicate=2, context=2).sizes(12) == (2, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": 0}, "context must be at least 1, got 0"),
        ({"turns": 0}, "turns must be 1, or more with context 3 or more, got 0"),
        ({"context": 2, "turns": 2}, "got 2 with context 2"),
    ],
)
def test_meshes_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MeshConfig(**settings)


def test_rows_with_fewer_tokens_than_pieces_are_refused():
    with pytest.raises(ValueError, match=r"a row of 41 tokens cannot be cut into 42 pieces for 14 processes.*seq_len"):
        context(0, 14, turns=3).cut(make_batch(packed=False))


def test_memories_that_only_the_last_process_has_cannot_be_carried():
    team = Team(0, 2)
    team.context = context(0, 2)
    with pytest.raises(ValueError, match="carry_state goes on from the end of a row"):
        check_team(tiny_model(), tiny_config("store", carry_state=True, view="streams"), team)


def test_a_sequence_that_is_cut_starts_anew():
    model, batch = tiny_model(), make_batch(packed=False)
    alone = context(0, 2)
    with alone.reading(model, alone.cut(batch)), pytest.raises(ValueError, match="starts anew; pass no state"):
        model.features(batch.tokens, model.init_state(2))
    assert model.relay is None
