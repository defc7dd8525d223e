"""Learning at evaluation against torch's own optimisers, and what must not change anything."""

import copy
import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
import torch
from learning_cases import (
    CHUNK,
    LEARNERS,
    LEARNING,
    LENGTHS,
    MODES,
    PER_DOCUMENT,
    SCORERS,
    SEQ_LEN,
    documents,
    run,
    varied_model,
)
from tolerances import OUTPUT

from fastweight.evaluate import Scored, score, score_and_learn
from fastweight.learn import DocumentLora, GlobalSgd, InPlaceSgd, score_pieces
from fastweight.learn import scored as scored_module
from fastweight.learn.lora import linear_layers
from fastweight.learn.pieces import Text
from fastweight.mixers.delta import DeltaConfig
from fastweight.model import BlockConfig, Model, ModelConfig
from fastweight.presets import preset_names

ALL = [(i, position) for i, length in enumerate(LENGTHS) for position in range(1, length + 1)]
TINY = [name for name in preset_names() if name.startswith("tiny-")]


def values(ledger):
    """Nats of all targets in the order of the text."""
    return np.array([ledger.nats[place][0] for place in sorted(ledger.nats)])


def losses(model, tokens):
    """Differentiable −ln p of tokens[1:], the whole document read from nothing."""
    logits, _ = model(torch.from_numpy(tokens[:-1])[None])
    return torch.nn.functional.cross_entropy(logits[0], torch.from_numpy(tokens[1:]), reduction="none")


def static(learner):
    return dataclasses.replace(learner, lr=0.0)


# P3: each target exactly once.


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("length", [1, 6, 7, 8, 11, 12, 13, 15, 17, 22])
def test_golf_p3_every_target_is_scored_exactly_once_whatever_the_length(scorer, length):
    found = run(scorer, varied_model(), documents([length, 2]))
    assert Counter({p: len(nats) for p, nats in found.nats.items()}) == Counter(
        [(0, i) for i in range(1, length + 1)] + [(1, 1), (1, 2)]
    )


@pytest.mark.parametrize("scorer", SCORERS)
def test_golf_p3_the_sum_does_not_depend_on_how_many_are_read_side_by_side(scorer):
    model, texts = varied_model(torch.float64), documents()
    sums = []
    for batch_size in (1, 2, 8):
        found = run(scorer, model, texts, batch_size=batch_size)
        assert sorted(found.nats) == ALL
        sums.append(found.evaluation.nats)
    assert max(sums) - min(sums) <= 1e-9


# P4: what must change nothing.


@pytest.mark.parametrize("scorer", LEARNING)
def test_golf_p4_rate_zero_is_the_same_bit_for_bit_as_never_learning(scorer, monkeypatch):
    kind = scorer.split()[0]
    model, texts, learner = varied_model(), documents(), static(LEARNERS[kind])
    found = values(run(scorer, model, texts, learner))
    monkeypatch.setattr(type(learner), "learn", lambda self, model, weights, scored: weights)
    assert (found == values(run(scorer, model, texts, learner))).all()


@pytest.mark.parametrize("scorer", LEARNING)
def test_golf_p4_rate_zero_is_plain_scoring(scorer):
    model, texts, plain = varied_model(torch.float64), documents(), "windows" if scorer == "sgd exact" else "document"
    # Exact learners per document see SEQ_LEN tokens; with as many as the longest document they see what plain ones do.
    settings = {} if plain == "windows" else {"seq_len": 64}
    found = values(run(scorer, model, texts, static(LEARNERS[scorer.split()[0]]), **settings))
    want = values(run(plain, model, texts, **settings))
    np.testing.assert_allclose(found, want, rtol=OUTPUT[torch.float64])


@pytest.mark.parametrize("scorer", LEARNING)
def test_golf_p4_a_chunk_that_never_ends_is_plain_scoring_bit_for_bit(scorer):
    kind, mode = scorer.split()
    model, texts = varied_model(), documents()
    endless = dataclasses.replace(LEARNERS[kind], chunk_size=10**9)
    plain = "windows" if scorer == "sgd exact" else "document"
    settings = {"seq_len": 64} if kind in PER_DOCUMENT else {}
    assert (
        values(run(scorer, model, texts, endless, **settings)) == values(run(plain, model, texts, **settings))
    ).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", PER_DOCUMENT)
def test_golf_p4_documents_are_forgotten_so_that_their_order_does_not_matter(kind, mode):
    model, texts = varied_model(torch.float64), documents()
    order = [4, 0, 3, 1, 5, 2]
    want = run(f"{kind} {mode}", model, texts).nats
    found = run(f"{kind} {mode}", model, [texts[i] for i in order]).nats
    for (i, position), nats in found.items():
        assert math.isclose(nats[0], want[order[i], position][0], rel_tol=OUTPUT[torch.float64])


@pytest.mark.parametrize("scorer", LEARNING)
def test_the_model_is_bit_identical_afterwards(scorer):
    model = varied_model()
    before = copy.deepcopy(model.state_dict())
    hooks = [len(part._forward_hooks) for part in model.modules()]
    run(scorer, model, documents())
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert [len(part._forward_hooks) for part in model.modules()] == hooks


# P5: reading once equals reading again, where nothing is learned.


@pytest.mark.parametrize("kind", LEARNERS)
@pytest.mark.parametrize("name", ["varied", *TINY])
def test_golf_p5_cached_equals_exact_at_rate_zero(name, kind):
    model = varied_model() if name == "varied" else Model.from_preset(name, vocab_size=61)
    learner, texts = dataclasses.replace(LEARNERS[kind], lr=0.0, chunk_size=33), documents((100, 0, 7, 70))
    exact, cached = (values(run(f"{kind} {mode}", model, texts, learner, seq_len=128, stride=None)) for mode in MODES)
    np.testing.assert_allclose(cached, exact, rtol=OUTPUT[torch.float32], atol=OUTPUT[torch.float32])


def test_golf_p5_the_modes_differ_once_something_is_learned():
    found = [run(f"in-place {mode}", varied_model(), documents(), seq_len=64).evaluation.nats for mode in MODES]
    assert abs(found[0] - found[1]) > 1e-4


@pytest.mark.parametrize("kind", LEARNERS)
def test_cached_reads_each_token_once(kind):
    assert run(f"{kind} cached", varied_model(), documents()).evaluation.forwarded_per_token == 1


def test_exact_counts_the_tokens_that_are_read_again():
    texts = documents([30])
    # Chunks end at 7, 14, 21, 28 and 30, windows hold 12.
    assert run("lora exact", varied_model(), texts).evaluation.forwarded_tokens == 7 + 12 * 4
    # Windows of 12 end at 12, 17, 22, 27 and 30. Chunks are 12 targets, 15 (the first number from 12 on) and 3.
    learner = dataclasses.replace(LEARNERS["sgd"], chunk_size=12, epochs=3)
    assert run("sgd exact", varied_model(), texts, learner).evaluation.forwarded_tokens == 12 * 5 + 3 * (12 + 15)


# P6: distributions.


@pytest.mark.parametrize("scorer", SCORERS)
def test_golf_p6_every_distribution_sums_to_one(scorer):
    found = run(scorer, varied_model(), documents())
    assert max(abs(log_probs.logsumexp(-1).item()) for log_probs in found.log_probs.values()) <= 1e-5


def test_golf_p6_the_score_is_the_entry_of_the_target():
    texts = documents()
    found = run("lora cached", varied_model(), texts)
    for (i, position), nats in found.nats.items():
        assert nats[0] == -found.log_probs[i, position][texts[i][0][position]].item()


# Learners against torch's own optimisers on copies of the model.


def test_in_place_learning_is_descent_on_the_down_projections():
    model, (tokens, num_bytes) = varied_model(torch.float64), documents([3 * CHUNK])[0]
    found = values(
        run("in-place exact", model, [(tokens, num_bytes)], InPlaceSgd(chunk_size=CHUNK, lr=0.2), seq_len=64)
    )
    copied, want = copy.deepcopy(model), []
    downs = [block.feed_forward.down.weight for block in copied.blocks]
    for start in range(0, 3 * CHUNK, CHUNK):
        chunk = losses(copied, tokens[: start + CHUNK + 1])[start:]
        want += chunk.tolist()
        steps = torch.autograd.grad(chunk.mean(), downs)
        with torch.no_grad():
            for weight, step in zip(downs, steps, strict=True):
                weight -= 0.2 * step
    np.testing.assert_allclose(found, want, rtol=OUTPUT[torch.float64])


def test_lora_learns_as_adamw_does_on_merged_copies():
    model, (tokens, num_bytes) = varied_model(torch.float64), documents([3 * CHUNK])[0]
    learner = DocumentLora(chunk_size=CHUNK, lr=0.03, rank=2, alpha=3.0, weight_decay=0.1)
    found = values(run("lora exact", model, [(tokens, num_bytes)], learner, seq_len=64))
    start = learner.start(model)
    factors = {name: tensor[0].clone().requires_grad_() for name, tensor in start.tensors.items()}
    options = {"lr": 0.03, "betas": learner.betas, "eps": learner.eps, "weight_decay": 0.1}
    optimizer, want = torch.optim.AdamW(factors.values(), **options), []
    for begin in range(0, 3 * CHUNK, CHUNK):
        merged = {
            f"{layer}.weight": model.get_parameter(f"{layer}.weight").detach() + 1.5 * factors[b] @ factors[a]
            for layer, (a, b) in start.layers.items()
        }
        inputs = torch.from_numpy(tokens[: begin + CHUNK])[None]
        logits, _ = torch.func.functional_call(model, merged, (inputs,))
        targets = torch.from_numpy(tokens[begin + 1 : begin + CHUNK + 1])
        chunk = torch.nn.functional.cross_entropy(logits[0, begin:], targets, reduction="none")
        want += chunk.tolist()
        optimizer.zero_grad()
        chunk.mean().backward()
        optimizer.step()
    np.testing.assert_allclose(found, want, rtol=OUTPUT[torch.float64])


def test_sgd_learns_as_torch_does_with_momentum_clipping_and_a_cosine():
    model, (tokens, num_bytes) = varied_model(torch.float64), documents([4 * CHUNK])[0]
    learner = GlobalSgd(chunk_size=CHUNK, lr=0.2, clip=0.5, epochs=2, seq_len=4, batch_size=1)
    # Windows as long as chunks: each is one window read from nothing.
    found = run("sgd exact", model, [(tokens, num_bytes)], learner, seq_len=CHUNK, stride=CHUNK)
    copied, want = copy.deepcopy(model), []
    optimizer = torch.optim.SGD(copied.parameters(), lr=0.2, momentum=0.9)
    for chunk in range(4):
        start, stop = chunk * CHUNK, (chunk + 1) * CHUNK
        want += losses(copied, tokens[start : stop + 1]).tolist()
        optimizer.param_groups[0]["lr"] = 0.1 * (1 + math.cos(math.pi * chunk / 4))
        for _ in range(2):
            for begin in range(start, stop, 4):
                optimizer.zero_grad()
                losses(copied, tokens[begin : min(begin + 4, stop) + 1]).mean().backward()
                for parameter in copied.parameters():  # momentum moves also what these scores do not depend on
                    parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                torch.nn.utils.clip_grad_norm_(copied.parameters(), 0.5, error_if_nonfinite=True)
                optimizer.step()
    np.testing.assert_allclose(values(found), want, rtol=1e-6)  # torch adds 1e-6 to the norm that it clips by


def test_in_place_steps_beyond_the_norm_guard_are_scaled_back():
    model = varied_model()
    learner, seen = InPlaceSgd(chunk_size=CHUNK, lr=1e6, max_norm=0.5), []
    score_and_learn(model, documents([30]), learner, watch=lambda weights, _: seen.append(weights))
    for name, delta in seen[-1].tensors.items():
        limit = 0.5 * model.get_parameter(f"{name}.weight").norm()
        assert math.isclose(delta[0].norm().item(), limit.item(), rel_tol=1e-5)


def test_without_a_norm_guard_projections_that_are_zero_learn_too():
    model, seen = varied_model(), []
    for part in model.modules():
        if hasattr(part, "down"):
            torch.nn.init.zeros_(part.down.weight)
    learner = InPlaceSgd(chunk_size=CHUNK, max_norm=math.inf)
    assert math.isfinite(score_and_learn(model, documents([30]), learner, watch=lambda w, _: seen.append(w)).nats)
    assert all(0 < delta.norm() < math.inf for delta in seen[-1].tensors.values())


@pytest.mark.parametrize("logits", [1 << 24, 3 * 61])  # all at a time, or three targets
def test_the_gradient_of_a_score_is_that_of_the_whole_passage(logits, monkeypatch):
    monkeypatch.setattr(scored_module, "LOGITS_PER_CHUNK", logits)
    model, (tokens, num_bytes) = varied_model(torch.float64), documents([20])[0]
    weights = GlobalSgd().start(model, 1)
    piece = Text(0, torch.from_numpy(tokens), num_bytes).whole()
    scored, _ = score_pieces(model, weights, [piece], gradient=True)
    want = torch.autograd.grad(losses(model, tokens).sum(), list(model.parameters()))
    np.testing.assert_allclose(scored.nats, losses(model, tokens).tolist(), rtol=OUTPUT[torch.float64])
    for (name, _), gradient in zip(model.named_parameters(), want, strict=True):
        torch.testing.assert_close(scored.gradient[name], gradient, rtol=1e-9, atol=1e-11)


# What a learner is fed.


def test_only_scoring_makes_a_scored():
    with pytest.raises(TypeError, match="score first, then learn"):
        Scored((), np.zeros(0))


def test_a_scored_holds_what_was_scored_and_nothing_after_it():
    seen, texts = [], documents()
    score_and_learn(varied_model(), texts, LEARNERS["in-place"], watch=lambda _, scored: seen.append(scored))
    for scored in seen:
        rows = zip(scored.document_ids, scored.positions, scored.targets.tolist(), scored.num_bytes, strict=True)
        assert all((texts[i][0][p], texts[i][1][p]) == (target, size) for i, p, target, size in rows)
        assert all(len(piece.text.tokens) == piece.stop + 1 for piece in scored.pieces)
    assert sum(scored.num_targets for scored in seen) == len(ALL)


def test_sums_by_the_length_of_the_document_add_up():
    found = run("lora cached", varied_model(), documents(), bucket_width=1)
    evaluation = found.evaluation
    assert sum(bucket.tokens for bucket in evaluation.lengths) == evaluation.tokens
    (bucket,) = [b for b in evaluation.lengths if b.start <= 24 < b.stop]
    # The only document of 24 to 31 targets is number 4.
    assert math.isclose(bucket.nats, sum(n[0] for (i, _), n in found.nats.items() if i == 4), rel_tol=1e-12)


def test_lora_takes_the_layers_that_are_named():
    model = varied_model()
    assert list(linear_layers(model, ("feed_forward.down",))) == [f"blocks.{i}.feed_forward.down" for i in range(4)]
    assert list(linear_layers(model, ("blocks.0.mixer.qkv",))) == ["blocks.0.mixer.qkv"]


# Bad input.


@pytest.mark.parametrize(("settings", "message"), [
    ({"mode": "exat"}, "unknown mode 'exat'. Did you mean exact"),
    ({"seq_len": 0}, "seq_len must be at least 1"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        score_and_learn(varied_model(), documents(), LEARNERS["lora"], **settings)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: GlobalSgd(chunk_size=0), "sgd: chunk_size must be at least 1, got 0"),
    (lambda: GlobalSgd(lr=-1.0), "sgd: lr must be finite and not negative"),
    (lambda: GlobalSgd(momentum=1.0), "sgd: momentum must lie in"),
    (lambda: GlobalSgd(clip=0.0), "sgd: clip must be positive"),
    (lambda: DocumentLora(rank=0), "lora: rank must be at least 1"),
    (lambda: DocumentLora(lr=math.nan), "lora: lr must be finite"),
    (lambda: DocumentLora(betas=(0.9, 1.0)), "lora: betas must lie in"),
    (lambda: DocumentLora(eps=0.0), "lora: eps must be positive"),
    (lambda: InPlaceSgd(lr=math.inf), "in-place: lr must be finite"),
    (lambda: InPlaceSgd(max_norm=0.0), "in-place: max_norm must be positive"),
    (lambda: DocumentLora(layers=("qvk",)).start(varied_model()), "fits no linear layer. Did you mean qkv"),
])  # fmt: skip
def test_learners_that_make_no_sense_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_more_epochs_than_readings_are_refused_before_anything_is_scored():
    with pytest.raises(ValueError, match="read once gives one step, got 2 epochs"):
        score_and_learn(varied_model(), documents(), dataclasses.replace(LEARNERS["sgd"], epochs=2))


def test_a_model_without_feed_forwards_has_nothing_for_in_place_learning():
    block = BlockConfig(mixer=DeltaConfig(num_heads=2, head_dim=4))
    with pytest.raises(ValueError, match="no feed-forward"):
        InPlaceSgd().start(Model(ModelConfig(vocab_size=9, d_model=8, blocks=(block,))))


def test_learning_that_diverges_is_named_with_its_place():
    learner = dataclasses.replace(LEARNERS["sgd"], lr=1e30, clip=1e30)
    with pytest.raises(ValueError, match=r"not finite. The model diverged while it learned \(sgd\); lower the rate"):
        score_and_learn(varied_model(), documents(), learner)


def test_a_layer_that_is_never_called_is_refused(monkeypatch):
    model = varied_model()
    feed_forward = model.blocks[1].feed_forward
    monkeypatch.setattr(
        feed_forward, "forward", lambda x: torch.nn.functional.linear(feed_forward.hidden(x), feed_forward.down.weight)
    )
    with pytest.raises(ValueError, match=r"reads blocks.1.feed_forward.down without calling it"):
        score_and_learn(model, documents(), LEARNERS["in-place"])


def test_scores_at_any_rate_stay_comparable_with_plain_ones():
    """All ways of scoring have the same targets and bytes."""
    model, texts = varied_model(), documents()
    plain = score(model, texts, seq_len=SEQ_LEN)
    found = run("lora exact", model, texts).evaluation
    assert (found.tokens, found.bytes, found.documents) == (plain.tokens, plain.bytes, plain.documents)
