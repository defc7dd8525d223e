"""Depth recurrence and what a model may learn about its residual stream: one Model in many configurations."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from tolerances import assert_close, assert_trees_close

from fastweight import BlockConfig, FeedForwardConfig, Model, ModelConfig, load, load_state
from fastweight.effort import effective_parameters, empty_model, forward_flops
from fastweight.hf.cache import can_crop
from fastweight.mixers.attention import AttentionConfig
from fastweight.mixers.delta import DeltaConfig
from fastweight.mixers.lact import LactConfig
from fastweight.mixers.ttt import TTTLinearConfig
from fastweight.presets import preset

D = 16
ATTENTION = AttentionConfig(
    num_heads=4, num_kv_heads=2, rotary_dim=2, qk_norm="head", norm="rms-unit", qk_gain=5.0, exclude_self=True,
    output_gate=True, gate_width=5, gate_scale=0.5,
)  # fmt: skip
# All of it at once: a prelude, a core of two blocks, three loops, a coda.
EVERYTHING = {
    "loops": (1, 3, 3), "norm": "rms-unit", "depth_scaled_norms": True, "embedding_norm": True, "smear": 5,
    "skips": "gated", "logit_softcap": 30.0, "tie_embeddings": True,
}  # fmt: skip


def block(mixer=ATTENTION, kind="leaky-relu2", **changes) -> BlockConfig:
    return BlockConfig(mixer=mixer, feed_forward=FeedForwardConfig(kind=kind, hidden=24), **changes)


MIXED = {"x0_mix": True, "residual_factors": "channel"}
BLOCKS = {
    "shared": (
        block(**MIXED),
        block(**MIXED, residual="parallel"),
        block(dataclasses.replace(ATTENTION, window=4), x0_mix=True),
        block(residual_factors="scalar"),
    ),
    "per-visit": (
        block(**MIXED, per_visit=True),
        block(**MIXED, residual="parallel", per_visit=True, pre_conv=3),
        block(DeltaConfig(num_heads=2, head_dim=4, gated=True), **MIXED, per_visit=True, norm_position="both"),
        block(residual_factors="scalar"),
    ),
    "lanes": (
        block(**MIXED),
        block(**MIXED, residual="lanes", per_visit=True),
        block(DeltaConfig(num_heads=2, head_dim=4, gated=True), residual="lanes", norm_position="both"),
        block(residual_factors="scalar", residual="lanes"),
    ),
}


def build(blocks="shared", **changes) -> Model:
    """A model in float64 whose every weight is moved off its initial value, so that nothing hides behind a zero."""
    torch.manual_seed(0)
    layers = BLOCKS[blocks] if isinstance(blocks, str) else blocks
    config = ModelConfig(**({"vocab_size": 19, "d_model": D, "blocks": layers, "init_std": 0.3} | changes))
    return moved(Model(config).double())


def moved(model: Model) -> Model:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tokens(batch=2, length=11, seed=3):
    return torch.randint(0, 19, (batch, length), generator=torch.Generator().manual_seed(seed))


def plain(**changes) -> Model:
    """One attention block and no option but those given."""
    return build((block(AttentionConfig(num_heads=2), "relu2"),), **changes)


def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


# ---- loops ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", BLOCKS)
def test_golf_p15_one_loop_equals_the_plain_model(blocks):
    looped, flat = build(blocks, **EVERYTHING | {"loops": (1, 3, 1)}), build(blocks, **EVERYTHING | {"loops": None})
    flat.load_state_dict(looped.state_dict())
    assert looped.visits == flat.visits == (0, 1, 2, 3)
    assert torch.equal(looped(tokens())[0], flat(tokens())[0])


@pytest.mark.parametrize("blocks", BLOCKS)
def test_golf_p15_a_loop_is_the_same_model_with_copied_blocks(blocks):
    looped = build(blocks, **EVERYTHING | {"depth_scaled_norms": False})
    order, config = looped.visits, looped.config
    copies = tuple(dataclasses.replace(config.blocks[i], per_visit=False) for i in order)
    unrolled = Model(dataclasses.replace(config, blocks=copies, order=None, loops=None)).double()
    source, weights = looped.state_dict(), {}
    for name in unrolled.state_dict():
        parts = name.split(".")
        if parts[0] == "blocks":
            place = int(parts[1])
            parts[1] = str(order[place])
            if parts[2] == "weights" and config.blocks[order[place]].per_visit:
                parts[-1] = str(order[:place].count(order[place]))
        weights[name] = source[".".join(parts)]
    unrolled.load_state_dict(weights)
    assert torch.equal(looped(tokens())[0], unrolled(tokens())[0])


@pytest.mark.parametrize("blocks", BLOCKS)
def test_golf_p15_gradients_of_shared_weights_are_those_of_finite_differences(blocks):
    model = build(blocks, **EVERYTHING)
    text, probe = tokens(2, 7), torch.randn(2, 7, 19, dtype=torch.float64)

    def value() -> torch.Tensor:
        return (model(text)[0] * probe).sum()

    value().backward()
    for name, parameter in model.named_parameters():
        direction, step = torch.randn_like(parameter), 1e-6
        with torch.no_grad():
            parameter.add_(step * direction)
            above = value()
            parameter.add_(-2 * step * direction)
            below = value()
            parameter.add_(step * direction)
        want, got = (above - below) / (2 * step), (parameter.grad * direction).sum()
        # Central differences in float64: h² of truncation and 1e-16 / h of rounding, both relative to the whole sum.
        assert abs(got - want) <= 1e-6 * max(1.0, abs(want)), f"{name}: {got} against {want}"


def test_golf_p15_the_number_of_parameters_does_not_depend_on_the_loops():
    counts = {build(**EVERYTHING | {"loops": (1, 3, r), "skips": "none"}).num_parameters for r in (1, 2, 5)}
    assert len(counts) == 1


def test_weights_that_visits_own_grow_with_the_loops_by_vectors_alone():
    one, three = (build("per-visit", loops=(1, 3, r)).num_parameters for r in (1, 3))
    assert three - one == 2 * 2 * 4 * D  # two blocks of the core, two more visits, four vectors


def test_golf_p15_a_changed_document_never_changes_another_ones_scores():
    for blocks in BLOCKS:
        model, ends = build(blocks, **EVERYTHING), torch.tensor([0, 1, 6, 7, 11])
        first, other = tokens(1), tokens(1).clone()
        other[0, 1:6] = (other[0, 1:6] + 7) % 19
        before, after = (model(text, cu_seqlens=ends)[0] for text in (first, other))
        assert torch.equal(before[:, :1], after[:, :1])
        assert torch.equal(before[:, 6:], after[:, 6:])
        assert not torch.equal(before[:, 1:6], after[:, 1:6])


def test_golf_p15_packed_documents_read_as_they_do_alone_also_when_they_go_on():
    for blocks in BLOCKS:
        model, text = build(blocks, **EVERYTHING), tokens(1, 22)
        lengths = (1, 5, 4, 1)
        ends = torch.tensor([0, *lengths]).cumsum(0)
        one, state = model(text[:, :11], cu_seqlens=ends)
        two, _ = model(text[:, 11:], state, cu_seqlens=ends)
        parts = zip(text[:, :11].split(lengths, 1), text[:, 11:].split(lengths, 1), strict=True)
        alone = [model(torch.cat(pair, 1))[0].split(pair[0].shape[1], 1) for pair in parts]
        assert_close(one, torch.cat([pair[0] for pair in alone], 1), 1e-12)
        assert_close(two, torch.cat([pair[1] for pair in alone], 1), 1e-12)


@pytest.mark.parametrize("blocks", BLOCKS)
def test_step_by_step_equals_all_at_once(blocks):
    model, text = build(blocks, **EVERYTHING), tokens()
    want, end = model(text)
    state, steps = model.init_state(2), []
    for t in range(text.shape[1]):
        logits, state = model(text[:, t : t + 1], state)
        steps.append(logits)
    assert_close(torch.cat(steps, 1), want, 1e-12)
    assert len(state.visits) == 8
    assert_trees_close(state._tree(), end._tree(), 1e-12)


@pytest.mark.parametrize("blocks", BLOCKS)
def test_any_cut_equals_all_at_once(blocks):
    model, text = build(blocks, **EVERYTHING), tokens()
    want = model(text)[0]
    for cut in (1, 4, 10):
        first, state = model(text[:, :cut])
        second, _ = model(text[:, cut:], state)
        assert_close(torch.cat([first, second], 1), want, 1e-12)


@pytest.mark.parametrize("blocks", BLOCKS)
def test_changing_the_future_leaves_the_past_bit_identical(blocks):
    model, text = build(blocks, **EVERYTHING).float(), tokens()
    for t in (1, 5, 10):
        changed = torch.cat([text[:, :t], tokens(seed=8)[:, t:]], 1)
        assert torch.equal(model(text)[0][:, :t], model(changed)[0][:, :t])


@pytest.mark.parametrize("blocks", BLOCKS)
def test_a_saved_model_and_state_go_on_bit_for_bit(blocks, tmp_path):
    model, text = build(blocks, **EVERYTHING), tokens()
    _, state = model(text[:, :5])
    model.save(tmp_path)
    state.save(tmp_path / "state")
    again = load(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(text[:, 5:], load_state(tmp_path / "state"))[0], model(text[:, 5:], state)[0])


def test_a_state_keeps_the_smeared_token_through_fork_select_where_and_detach():
    model, text = build(**EVERYTHING), tokens()
    _, state = model(text)
    assert torch.equal(state.select([1, 0]).last, state.last[[1, 0]])
    assert torch.equal(state.fork().detach().last, state.last)
    mixed = state.where(torch.tensor([True, False]), model.init_state(2))
    assert torch.equal(mixed.last[0], state.last[0])
    assert (mixed.last[1] == 0).all()


def test_activation_checkpointing_changes_no_gradient():
    grads = []
    for on in (False, True):
        model = build("per-visit", **EVERYTHING)
        model.checkpointing = on
        model(tokens())[0].square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# ---- another number of loops ----------------------------------------------------------------------------------------


def test_loops_can_be_changed_and_are_those_of_a_model_built_so():
    model = build(**EVERYTHING | {"skips": "none"})
    for count in (1, 2, 7):
        built = Model(model.config.with_loops(count)).double()
        built.load_state_dict(model.state_dict())
        assert torch.equal(model.set_loops(count)(tokens())[0], built(tokens())[0])
    want = build(**EVERYTHING | {"skips": "none"})(tokens())[0]
    assert torch.equal(model.set_loops()(tokens())[0], want)


def test_fewer_loops_use_the_inner_skips_and_the_first_weights():
    model = build("per-visit", **EVERYTHING)
    fewer = model.config.with_loops(1)
    built = Model(fewer).double()
    built.load_state_dict({name: model.state_dict()[name] for name in built.state_dict()})
    assert torch.equal(model.set_loops(1)(tokens())[0], built(tokens())[0])


def test_a_state_belongs_to_its_loops():
    model = build(**EVERYTHING)
    _, state = model(tokens())
    model.set_loops(2)
    with pytest.raises(ValueError, match="belongs to another model"):
        model(tokens(), state)
    model.set_loops()
    model(tokens(), state)


def test_what_is_saved_is_the_loops_of_the_config(tmp_path):
    model = build(**EVERYTHING).set_loops(1)
    model.save(tmp_path)
    assert load(tmp_path).visits == (0, 1, 2, 1, 2, 1, 2, 3)


@pytest.mark.parametrize(
    ("make", "act", "message"),
    [
        (lambda: build(**EVERYTHING), lambda m: m.set_loops(4), "skips for at most 9 visits, the order makes 10"),
        (lambda: build("per-visit", loops=(1, 3, 2)), lambda m: m.set_loops(3), "block 1 has weights for 2 visits"),
        (lambda: build(), lambda m: m.set_loops(2), "no loops"),
        (lambda: build(**EVERYTHING), lambda m: m.set_loops(0), "at least once, got 0"),
        (lambda: build(), lambda m: m.set_order((0, 9)), r"names block\(s\) \[9\]"),
        (lambda: build(), lambda m: m.set_order(()), "order is empty"),
    ],
)
def test_an_order_that_the_model_cannot_follow_is_refused(make, act, message):
    with pytest.raises(ValueError, match=message):
        act(make())


# ---- each option is its formula -------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1), (1, 0, 1, 0)])
def test_a_block_reads_a_mixture_of_the_stream_and_the_embedding(order):
    layers = tuple(block(AttentionConfig(num_heads=2), x0_mix=True, per_visit=True) for _ in range(2))
    model = build(layers, order=order)
    x0 = x = model.embedding(tokens())
    seen = {0: 0, 1: 0}
    for i in order:
        part = model.blocks[i]
        u = part.weights.stream[seen[i]] * x + part.weights.x0[seen[i]] * x0
        mixed = u + part.mixer(part.mixer_norm(u), part.mixer.init_state(2))[0]
        x = mixed + part.feed_forward(part.feed_forward_norm(mixed))
        seen[i] += 1
    assert_close(model(tokens())[0], model.head(model.norm(x)), 1e-12)


@pytest.mark.parametrize("residual", ["sequential", "parallel"])
@pytest.mark.parametrize("factors", ["scalar", "channel"])
def test_mixer_and_feed_forward_are_weighed(factors, residual):
    model = build((block(AttentionConfig(num_heads=2), residual_factors=factors, residual=residual),))
    part, x = model.blocks[0], torch.randn(2, 5, D, dtype=torch.float64)
    a, m = part.weights.mixer[0], part.weights.feed_forward[0]
    assert a.numel() == m.numel() == {"scalar": 1, "channel": D}[factors]
    mixed = x + a * part.mixer(part.mixer_norm(x), part.mixer.init_state(2))[0]
    read = x if residual == "parallel" else mixed
    want = mixed + m * part.feed_forward(part.feed_forward_norm(read))
    assert_close(part(x, part.init_state(2), None, x)[0], want, 1e-12)


def test_two_lanes_are_each_read_by_one_part_and_written_by_both_and_end_in_their_mean():
    layers = (block(AttentionConfig(num_heads=2)), *(block(**MIXED, residual="lanes"),) * 2)
    model = build(layers)
    x0 = model.embedding(tokens())
    first = model.blocks[0]
    mixed = x0 + first.mixer(first.mixer_norm(x0), first.mixer.init_state(2))[0]
    lanes = [mixed + first.feed_forward(first.feed_forward_norm(mixed))] * 2
    for part in model.blocks[1:]:
        w, own = part.weights.lanes[0], part.weights
        u = [own.stream[0] * lane + own.x0[0] * x0 for lane in lanes]
        mixed = own.mixer[0] * part.mixer(part.mixer_norm(u[0]), part.mixer.init_state(2))[0]
        fed = own.feed_forward[0] * part.feed_forward(part.feed_forward_norm(u[1]))
        lanes = [u[0] + w[0] * mixed + w[1] * fed, u[1] + w[2] * mixed + w[3] * fed]
    assert_close(model(tokens())[0], model.head(model.norm((lanes[0] + lanes[1]) / 2)), 1e-12)


def test_new_lanes_compute_what_parallel_blocks_do():
    pair = []
    for residual in ("parallel", "lanes"):
        torch.manual_seed(0)
        layers = (block(**MIXED), block(**MIXED, residual=residual), block(residual=residual))
        pair.append(Model(ModelConfig(vocab_size=19, d_model=D, blocks=layers, init_std=0.3)).double())
    lanes = {name: w for name, w in pair[1].state_dict().items() if ".lanes." in name}
    assert sum(w.numel() for w in lanes.values()) == 8
    assert_close(pair[1](tokens())[0], pair[0](tokens())[0], 1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build((block(residual="lanes"), block())), "blocks without lanes come after them"),
        (lambda: block(residual="lanes", pre_conv=3), "no pre_conv"),
        (lambda: BlockConfig(mixer=ATTENTION, residual="lanes"), "needs a feed-forward"),
        (lambda: block(residual="lane"), '"parallel" or "lanes", got'),
    ],
)
def test_lanes_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_norms_of_deeper_blocks_are_scaled_down():
    model = build((block(AttentionConfig(num_heads=2)),) * 3, depth_scaled_norms=True, norm="rms-unit")
    x = model.embedding(tokens())
    for depth, part in enumerate(model.blocks):
        mixed = x + part.mixer(rms(x) / math.sqrt(depth + 1), part.mixer.init_state(2))[0]
        x = mixed + part.feed_forward(rms(mixed) / math.sqrt(depth + 1))
    assert_close(model(tokens())[0], model.head(rms(x)), 1e-12)


def test_the_embedding_is_normalised():
    model = plain(embedding_norm=True, embedding_scale=3.0)
    rows = rms(3.0 * model.embedding.weight)
    assert_close(model._embed(tokens(), torch.zeros(2), None), rows[tokens()], 1e-12)


def test_the_smear_gate_adds_the_token_before():
    model = plain(smear=5)
    e, gate, amount = model.embedding(tokens()), model.smear.weight, model.smear.amount
    want = e.clone()
    for b in range(2):
        for t in range(1, 11):
            open_ = 1 / (1 + torch.exp(-(gate * e[b, t, :5]).sum()))
            want[b, t] = e[b, t] + amount * open_ * e[b, t - 1]
    got, last = model.smear(e, model.init_state(2).last, None)
    assert_close(got, want, 1e-12)
    assert torch.equal(last[:, 0], e[:, -1])


@pytest.mark.parametrize("count", [2, 5, 6])
@pytest.mark.parametrize("kind", ["add", "gated"])
def test_skips_lead_from_the_first_half_to_the_second(kind, count):
    model = build((block(AttentionConfig(num_heads=2)),) * count, skips=kind)
    x, kept, half = model.embedding(tokens()), [], count // 2
    assert len(model.skips.weight) == half
    for i, part in enumerate(model.blocks):
        source = 2 * half - 1 - i  # the visit whose output this one takes: mirrored at the middle
        if i >= half and source >= 0:
            w, s = model.skips.weight[i - half], kept[source]
            g = 0 if kind == "add" else torch.sigmoid(model.skips.gate[i - half])
            x = x + w * s if kind == "add" else (1 - g) * w * s + g * x
        x = part(x, part.init_state(2), None)[0]
        kept.append(x)
    assert_close(model(tokens())[0], model.head(model.norm(x)), 1e-12)


def test_own_values_are_taken_out_of_every_head():
    model = build((block(dataclasses.replace(ATTENTION, output_gate=False, gate_width=0, gate_scale=1.0)),))
    mixer, x = model.blocks[0].mixer, torch.randn(1, 6, D, dtype=torch.float64)
    q, k, v = mixer.project(x, torch.zeros(1, dtype=torch.int64), None)
    want = torch.zeros(6, 4, 4, dtype=torch.float64)
    for t in range(6):
        for h in range(4):
            weights = torch.softmax(q[0, t, h] @ k[0, : t + 1, h // 2].T / math.sqrt(4), -1)
            y, own = weights @ v[0, : t + 1, h // 2], v[0, t, h // 2]
            want[t, h] = y - (y @ own) / (own @ own) * own
    assert_close(mixer(x, mixer.init_state(1))[0][0], want.flatten(1) @ mixer.out.weight.T, 1e-12)


def test_head_gates_read_the_first_channels_alone():
    model = build((block(dataclasses.replace(ATTENTION, exclude_self=False)),))
    mixer, x = model.blocks[0].mixer, torch.randn(1, 6, D, dtype=torch.float64)
    open_gate = copy.deepcopy(mixer)
    open_gate.gate = None
    open_gate.out.weight.data = torch.eye(D, dtype=torch.float64)
    heads = open_gate(x, mixer.init_state(1))[0].unflatten(-1, (4, 4))
    gates = torch.sigmoid(0.5 * (x[..., :5] @ mixer.gate.weight.T))
    want = (heads * gates[..., None]).flatten(2) @ mixer.out.weight.T
    assert mixer.gate.weight.shape == (4, 5)
    assert_close(mixer(x, mixer.init_state(1))[0], want, 1e-12)


def test_queries_and_keys_are_normalised_without_weights():
    mixer = build().blocks[0].mixer
    q, k, _ = mixer.project_unrotated(torch.randn(1, 6, D, dtype=torch.float64))
    assert not any("norm" in name for name, _ in mixer.named_parameters())
    assert_close(k.square().mean(-1), torch.ones(1, 6, 2, dtype=torch.float64), 1e-3)
    assert_close(q.square().mean(-1).sqrt(), mixer.gain.abs().expand(1, 6, 4), 1e-3)


def test_leaky_relu2_is_the_square_of_a_leaky_relu():
    part, x = build().blocks[0].feed_forward, torch.randn(2, 3, D, dtype=torch.float64)
    up = x @ part.up.weight.T
    hidden = torch.where(up > 0, up, up / 2) ** 2
    assert_close(part(x), hidden @ part.down.weight.T, 1e-12)


# ---- drawing new weights --------------------------------------------------------------------------------------------


MIXERS = [
    AttentionConfig(num_heads=4, num_kv_heads=2),
    DeltaConfig(num_heads=2, head_dim=8),
    TTTLinearConfig(num_heads=2),
    LactConfig(num_heads=2, num_fast_heads=2, chunk_size=4, window=4, low_rank=2),
]


@pytest.mark.parametrize("mixer", MIXERS, ids=lambda mixer: mixer.kind)
def test_new_projections_are_orthogonal_and_those_that_write_are_zero(mixer):
    config = ModelConfig(vocab_size=19, d_model=D, blocks=(block(mixer),), in_init="orthogonal", out_init="zero")
    part = Model(config).blocks[0]
    for layer in (part.mixer, part.feed_forward):
        read, write = layer.projections()
        assert write.numel() > 0
        assert (write == 0).all()
        for matrix in read:
            small = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
            assert_close(small @ small.T, torch.eye(len(small)), 1e-5)
    x = torch.randn(1, 9, D)
    assert torch.equal(part(x, part.init_state(1), None)[0], x)


def test_the_embedding_has_a_width_of_its_own():
    model = Model(preset("tiny-record", vocab_size=4096))
    assert abs(model.embedding.weight.std().item() / 0.005 - 1) < 0.02


def test_new_weights_of_the_stream_leave_it_plain():
    model = Model(ModelConfig(vocab_size=19, d_model=D, blocks=BLOCKS["per-visit"], **EVERYTHING | {"skips": "add"}))
    for name, value in model.named_parameters():
        if ".weights." in name:
            assert (value == (0.0 if ".x0." in name else 1.0)).all(), name
    assert model.smear.amount.item() == 0
    assert all((w == 1).all() for w in model.skips.weight)


# ---- off is off -----------------------------------------------------------------------------------------------------

OPTIONS = (
    "loops", "depth_scaled_norms", "embedding_norm", "smear", "skips", "embedding_std", "in_init", "out_init",
)  # fmt: skip


def old_config(config: ModelConfig) -> dict:
    """The JSON form from before any of the options existed."""
    data = json.loads(json.dumps(config.to_dict()))
    for name in OPTIONS:
        del data[name]
    for part in data["blocks"]:
        for name in ("x0_mix", "residual_factors", "per_visit"):
            del part[name]
        for name in ("gate_width", "gate_scale", "exclude_self"):
            part["mixer"].pop(name, None)
    return data


def test_a_config_from_before_the_options_is_the_config_with_all_of_them_off():
    for name in ("tiny-attention", "tiny-recurrent"):
        assert ModelConfig.from_dict(old_config(preset(name))) == preset(name)


# A logit and the norm of all logits of seeded models, computed by the version before the options existed.
BEFORE = {
    "tiny-attention": (-0.08262901686461545, 30.048640696147864),
    "tiny-recurrent": (-0.18928745266067942, 29.42610418906176),
    "tiny-lact": (0.2400008360696787, 29.37039622136937),
    "tiny-ttt-mlp": (0.19097512754950763, 28.212516028770885),
}


@pytest.mark.parametrize("name", BEFORE)
def test_a_model_without_options_draws_and_computes_what_it_always_did(name):
    torch.manual_seed(5)
    model = Model(ModelConfig.from_dict(old_config(preset(name)))).double()
    with torch.no_grad():
        logits = model(torch.arange(2 * 41).reshape(2, 41) * 7 % 257)[0]
    got = torch.stack([logits[1, 40, 3], logits.norm()])
    assert_close(got, torch.tensor(BEFORE[name], dtype=torch.float64), 1e-12)


def test_zero_amounts_and_plain_weights_change_nothing_but_rounding():
    model = build((block(AttentionConfig(num_heads=2)),) * 2)
    rich_block = block(AttentionConfig(num_heads=2), **MIXED)
    rich = Model(dataclasses.replace(model.config, blocks=(rich_block,) * 2, smear=5)).double()
    found = rich.load_state_dict(model.state_dict(), strict=False)
    assert found.unexpected_keys == []
    assert torch.equal(rich(tokens())[0], model(tokens())[0])


# ---- configs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", BLOCKS)
def test_every_option_survives_json(blocks):
    config = build(blocks, **EVERYTHING).config
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_loops_make_the_order():
    config = build(**EVERYTHING).config
    assert config.visits == (0, 1, 2, 1, 2, 1, 2, 3)
    assert config.with_loops(1).visits == (0, 1, 2, 3)
    assert dataclasses.replace(config, smear=0).visits == config.visits


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loops": (3, 3, 2)}, "loops must be"),
        ({"loops": (1, 5, 2)}, "stop <= 4 blocks"),
        ({"loops": (1, 3, 0)}, "count >= 1"),
        ({"loops": (1, 3)}, "loops must be tuple"),
        ({"loops": (1, 3, 2), "order": (0, 1, 2, 3)}, "Leave one of them out"),
        ({"smear": 17}, r"smear must lie in 0\.\.d_model 16"),
        ({"skips": "gate"}, "unknown skips 'gate'. Did you mean gated"),
        ({"skips": "add", "blocks": (block(),)}, "order has one visit"),
        ({"in_init": "orthognal"}, "Did you mean orthogonal"),
        ({"out_init": "orthogonal"}, "unknown out_init"),
        ({"embedding_std": -1.0}, "embedding_std must not be negative"),
        ({"depth_scaled_norms": True, "blocks": (block(norm_position="post"),)}, r"block\(s\) \[0\] have none"),
    ],
)
def test_a_senseless_setting_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: block(residual_factors="chanel"), "Did you mean channel"),
        (lambda: block(per_visit=True), "nothing that a visit could own"),
        (lambda: AttentionConfig(num_heads=2, gate_width=3), "belong to an output_gate"),
        (lambda: AttentionConfig(num_heads=2, output_gate=True, gate_width=-1), "must not be negative"),
        (lambda: build((block(AttentionConfig(num_heads=2, output_gate=True, gate_width=17)),)), "exceeds d_model 16"),
    ],
)
def test_a_senseless_block_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_cache_cannot_be_cropped_behind_a_smear_gate():
    model = plain()
    assert can_crop(model.config)
    assert not can_crop(dataclasses.replace(model.config, smear=3))


# ---- what it costs --------------------------------------------------------------------------------------------------


def test_parameters_in_use_are_those_of_every_visit():
    model = build("shared", **EVERYTHING)
    sizes = [sum(p.numel() for p in part.parameters()) for part in model.blocks]
    others = 2 * 4 * D + (5 + 1)  # four gated skips, the smear gate
    assert effective_parameters(model) == sum(sizes[i] for i in model.visits) + others + 19 * D
    assert effective_parameters(model.set_loops(1)) == sum(sizes) + others + 19 * D


def test_weights_that_visits_own_are_in_use_once():
    shared, own = (build((block(**MIXED, per_visit=p), block()), loops=(0, 2, 3)) for p in (False, True))
    assert effective_parameters(shared) == effective_parameters(own)


def test_operations_are_two_per_weight_of_a_matrix_and_visit():
    model = plain(loops=(0, 1, 3))
    matrices = 4 * D * D + 2 * D * 24
    assert forward_flops(model) == 2 * (3 * matrices + 19 * D)


@pytest.mark.parametrize(
    ("name", "unique", "used", "visits"),
    [
        # 9 × (attention 3·512² with half-width keys and values, feed-forward 2·512·1024, vectors) + embedding + 4 skips
        ("golf-baseline-9x512", 9 * (3 * 512**2 + 2 * 512 * 1024 + 4 * 512 + 8) + 1024 * 512 + 4 * 512, 17_059_912, 9),
        # 11 × the same with 4 × 512 inner width + embedding + 8 skips with gates
        (
            "golf-record-11x512",
            11 * (3 * 512**2 + 2 * 512 * 2048 + 4 * 512 + 8) + 8192 * 512 + 16 * 512,
            53_258_376,
            17,
        ),
        # 3 × 6.29 M + 6.29 M, and the vectors; 24 × 6.29 M + 6.29 M in use
        ("recurrent-3x8", 4 * 6_291_456 + 3 * (4 * 768 + 12), 25 * 6_291_456 + 24 * (4 * 768 + 12), 24),
    ],
)
def test_the_contests_models_count_as_they_must(name, unique, used, visits):
    model = empty_model(preset(name))
    assert (model.num_parameters, effective_parameters(model), len(model.visits)) == (unique, used, visits)


def test_the_record_loops_blocks_three_to_five():
    assert preset("golf-record-11x512").visits == (0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10)


def test_loops_of_a_preset_can_be_changed():
    assert preset("tiny-looped", loops=(0, 3, 1)).visits == (0, 1, 2)
    assert preset("tiny-looped", order=(2, 1, 0)).loops is None
