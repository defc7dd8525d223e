"""Scoring against plain loops that read each document whole, or each window from nothing."""

import math

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from tolerances import OUTPUT

from fastweight.data import ByteTokenizer
from fastweight.evaluate import DocumentList, encode_documents, loss_by_position, score
from fastweight.model import Model
from fastweight.plots import plot_loss_by_position
from fastweight.presets import preset_names

TOLERANCE = OUTPUT[torch.float32]
# Lengths around the pieces and windows used below; 0 is an empty text, whose document has no target.
LENGTHS = (5, 17, 0, 1, 40, 16, 23)


def documents(lengths=LENGTHS, vocab_size=257):
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, vocab_size, length + 1) for length in lengths]
    return [(ids, np.append(0, rng.integers(0, 5, len(ids) - 1))) for ids in tokens]


@torch.no_grad()
def target_losses(model, tokens, first=0):
    """−ln p of tokens[first + 1:], read from a fresh state at `first`, in float64 from float32 logits."""
    logits, _ = model(torch.from_numpy(tokens[first:-1])[None])
    return -logits[0].double().log_softmax(-1)[torch.arange(logits.shape[1]), torch.from_numpy(tokens[first + 1 :])]


def close(got, want):
    return math.isclose(got, want, rel_tol=TOLERANCE)


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize(("seq_len", "batch_size"), [(1, 3), (7, 1), (7, 4), (16, 2), (100, 8)])
def test_a_document_read_in_pieces_side_by_side_scores_as_if_read_alone_and_whole(attention, seq_len, batch_size):
    model, texts = tiny_model(attention=attention), documents()
    want = sum(target_losses(model, tokens).sum().item() for tokens, _ in texts if len(tokens) > 1)
    assert close(score(model, texts, seq_len=seq_len, batch_size=batch_size).nats, want)


def test_no_more_than_batch_size_documents_are_read_side_by_side():
    """Also when none of them ends in a step, so that no lane is free."""
    counts, texts = [], documents([30, 30, 30, 10, 25])
    score(tiny_model(), texts, seq_len=10, batch_size=2, watch=lambda _, scored: counts.append(len(scored.pieces)))
    # The third and fourth start when the first two end; the fifth when the fourth ends.
    assert counts == [2, 2, 2, 2, 2, 2, 1]


@pytest.mark.parametrize("name", [name for name in preset_names() if name.startswith("tiny-")])
def test_every_kind_of_layer_scores_documents_side_by_side_as_if_read_alone(name):
    model, texts = Model.from_preset(name), documents((150, 0, 7, 90))
    want = sum(target_losses(model, tokens).sum().item() for tokens, _ in texts if len(tokens) > 1)
    assert close(score(model, texts, seq_len=37, batch_size=2).nats, want)


@pytest.mark.parametrize("settings", [
    {"context": "document", "seq_len": 7, "batch_size": 3},
    {"context": "windows", "seq_len": 8, "stride": 3, "batch_size": 4},
    {"context": "windows", "seq_len": 8, "stride": 8, "batch_size": 1},
    {"context": "windows", "seq_len": 1, "batch_size": 5},
])  # fmt: skip
def test_every_target_is_scored_exactly_once(settings):
    texts = documents()
    found = score(tiny_model(), texts, bucket_width=1, **settings)
    # With buckets of one position, a target scored twice or left out shows in the counts of its position.
    for bucket in found.positions:
        held = [num_bytes[bucket.start] for _, num_bytes in texts if len(num_bytes) > bucket.start]
        assert (bucket.tokens, bucket.bytes) == (len(held), sum(held))
    assert found.tokens == sum(LENGTHS)
    assert found.documents == sum(length > 0 for length in LENGTHS)


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_a_window_scores_its_last_targets_from_a_fresh_state(stride):
    model, (tokens, num_bytes) = tiny_model(), documents([30])[0]
    found = score(model, [(tokens, num_bytes)], context="windows", seq_len=8, stride=stride, bucket_width=1)
    for bucket in found.positions:
        # The window that scores target t is the first to end at or after t: ends are 8, 8 + stride, ..., 30.
        end = min(30, 8 + math.ceil(max(bucket.start - 8, 0) / stride) * stride)
        first = max(end - 8, 0)
        want = target_losses(model, tokens[: bucket.start + 1], first)[-1].item()
        assert close(bucket.nats, want), bucket.start


def test_windows_read_the_tokens_that_their_stride_implies():
    found = score(tiny_model(), documents([30]), context="windows", seq_len=8, stride=4)
    # Ends at 8, 12, 16, 20, 24, 28 and 30: seven windows of eight tokens.
    assert found.forwarded_tokens == 7 * 8


def test_windows_as_long_as_the_documents_change_nothing():
    model, texts = tiny_model(), documents()
    assert close(score(model, texts, context="windows", seq_len=64).nats, score(model, texts, seq_len=64).nats)


def test_frozen_memory_scores_the_static_function():
    model, texts = tiny_model(), documents()
    found = score(model, texts, memory="frozen", seq_len=7).nats
    with model.frozen_memory():
        want = sum(target_losses(model, tokens).sum().item() for tokens, _ in texts if len(tokens) > 1)
    assert close(found, want)
    assert not close(found, score(model, texts).nats)


def test_the_memory_learns_again_after_frozen_scoring():
    model = tiny_model()
    score(model, documents(), memory="frozen")
    assert all(mixer.learning for mixer in model.mixers())


def test_scored_bytes_are_the_utf8_length_of_the_texts():
    texts = ["naïve café", "", "日本語のテキスト", "🙂🙂", "plain"]
    found = score(tiny_model(), encode_documents(ByteTokenizer(), texts))
    assert found.bytes == sum(len(text.encode()) for text in texts)


def test_bits_per_byte_of_a_uniform_model_is_the_entropy_of_its_vocabulary():
    model = tiny_model()
    torch.nn.init.zeros_(model.head.weight)
    found = score(model, encode_documents(ByteTokenizer(), ["one byte per token"]))
    assert math.isclose(found.bits_per_byte, math.log2(257), rel_tol=1e-6)


@pytest.mark.parametrize("limit", [1, 5, 6, 30, 1000])
def test_a_limit_on_tokens_scores_exactly_the_first_ones(limit):
    model, texts = tiny_model(), documents()
    losses = torch.cat([target_losses(model, tokens) for tokens, _ in texts if len(tokens) > 1])
    found = score(model, texts, max_tokens=limit, seq_len=7)
    assert found.tokens == min(limit, sum(LENGTHS))
    assert close(found.nats, losses[:limit].sum().item())


def test_a_limit_on_documents_scores_the_first_ones():
    assert score(tiny_model(), documents(), max_documents=2).tokens == LENGTHS[0] + LENGTHS[1]


def test_position_buckets_hold_the_positions_that_they_name():
    found = score(tiny_model(), documents([40, 9]), seq_len=11)
    for bucket in found.positions:
        held = [min(length, bucket.stop - 1) - bucket.start + 1 for length in (40, 9) if length >= bucket.start]
        assert bucket.tokens == sum(held)
    assert [b.start for b in found.positions] == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]


def test_the_sums_by_position_add_up_to_the_whole():
    found = score(tiny_model(), documents())
    rows = loss_by_position(found)
    assert (sum(row["tokens"] for row in rows), sum(row["bytes"] for row in rows)) == (found.tokens, found.bytes)
    assert math.isclose(sum(row["nats"] for row in rows), found.nats, rel_tol=1e-12)


def test_sums_do_not_lose_small_losses_beside_large_ones():
    from fastweight.evaluate.positions import PositionSums

    sums = PositionSums()
    sums.add(np.array([1]), np.array([1e8]), np.array([1]))
    for _ in range(1000):
        sums.add(np.array([1]), np.array([1e-4]), np.array([1]))
    # In float32 each addition would vanish: 1e8 + 1e-4 == 1e8.
    assert math.isclose(sums.nats - 1e8, 0.1, rel_tol=1e-4)


def test_progress_counts_up_to_the_announced_total():
    seen = []
    score(tiny_model(), documents(), seq_len=7, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (sum(LENGTHS), sum(LENGTHS))


def test_a_fault_is_named_with_its_document(monkeypatch):
    model = tiny_model()

    def faulty_at_17(state):
        rows = enumerate(state.position.tolist())
        return [f"visit 0: 1 inner update(s) of sequence {n} were not finite" for n, p in rows if p == 17]

    monkeypatch.setattr(model, "describe_faults", faulty_at_17)
    found = score(model, documents(), seq_len=7, batch_size=3)
    # Document 1 is the one with 17 targets.
    assert found.faults == ("document 1: visit 0: 1 inner update(s) were not finite",)


def test_a_loss_that_is_not_finite_is_refused_with_its_place():
    model, texts = tiny_model(vocab_size=300), documents([4, 6], vocab_size=200)
    texts[1][0][3] = 299
    model.embedding.weight.data[299] = math.nan
    with pytest.raises(ValueError, match="document 1: the loss of token 4 is not finite"):
        score(model, texts)


@pytest.mark.parametrize(("settings", "message"), [
    ({"context": "window"}, "Did you mean windows"),
    ({"memory": "of"}, "unknown memory 'of'"),
    ({"seq_len": 0}, "seq_len must be at least 1"),
    ({"context": "windows", "seq_len": 4, "stride": 5}, "stride must lie in 1..seq_len = 4, got 5"),
    ({"batch_size": 0}, "batch_size must be at least 1"),
    ({"max_tokens": 0}, "max_tokens must be at least 1"),
    ({"bucket_width": 0}, "bucket_width must be at least 1"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        score(tiny_model(), documents(), **settings)


@pytest.mark.parametrize("texts", [[], [""]])
def test_data_without_a_target_is_refused(texts):
    with pytest.raises(ValueError, match="nothing to score"):
        score(tiny_model(), encode_documents(ByteTokenizer(), texts))


@pytest.mark.parametrize("bad", [-1, 257])
def test_ids_outside_the_vocabulary_are_refused_with_their_document(bad):
    texts = documents([4, 6])
    texts[1][0][3] = bad
    with pytest.raises(ValueError, match=r"document 1: token ids .* the model's are 0\.\.256"):
        score(tiny_model(), texts)


def test_documents_whose_counts_do_not_match_their_tokens_are_refused():
    with pytest.raises(ValueError, match="document 0: 3 tokens, 2 byte counts"):
        score(tiny_model(), DocumentList([(np.zeros(3, np.int64), np.ones(2, np.int64))]))


def test_the_json_form_keeps_every_figure():
    import json

    found = score(tiny_model(), documents())
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["nats"] == found.nats
    assert data["bits_per_byte"] == pytest.approx(found.nats / math.log(2) / found.bytes, rel=1e-12)
    assert len(data["positions"]) == len(found.positions)


def test_the_plot_is_a_png_with_a_line_per_curve(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    lines = []
    draw = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, *a, **k: lines.append((x, y)) or draw(self, x, y, *a, **k))
    model, texts = tiny_model(), documents([300, 300])
    curves = {"memory": score(model, texts), "frozen": score(model, texts, memory="frozen")}
    plot_loss_by_position(curves, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    # Buckets below 128 have fewer than 100 targets in two documents and are left out.
    assert [line[0][0] for line in lines] == [(128 + 191) / 2] * 2


def test_a_plot_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no curves"):
        plot_loss_by_position({}, tmp_path / "loss.png")
