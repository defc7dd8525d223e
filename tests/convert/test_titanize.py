"""Pretrained attention becomes LiZA: exact at the start, the same at every cut, and attention again."""

import contextlib

import pytest
import torch
import transformers
from convert.liza_cases import ATTENTION, T, backbone, face, ids, with_settings, with_weights
from tolerances import assert_close
from torch import Tensor

from fastweight import Model, load
from fastweight.convert.in_place import add_in_place_memory
from fastweight.convert.mag import liza_layers, mag_weights, set_mag_weight
from fastweight.convert.titanize import restore_backbone, titanize
from fastweight.mixers.attention import AttentionConfig
from fastweight.mixers.delta import DeltaConfig
from fastweight.mixers.liza import LizaConfig


def greedy(model: Model, prompt: Tensor, count: int = 12, **options) -> list:
    return face(model).generate(prompt, max_new_tokens=count, do_sample=False, **options)[:, prompt.shape[1] :].tolist()


# P1: at μ = 0 the model is the backbone


@pytest.mark.parametrize("backend", ["naive", "chunked"])
@pytest.mark.parametrize("training", [False, True])
@with_settings
def test_p1_at_zero_logits_loss_gradients_and_cache_are_the_backbones_bit_for_bit(settings, training, backend):
    plain = backbone().train(training).set_backend(backend)
    model = titanize(plain, **settings)
    results = []
    for each in (plain, model):
        logits, state = each(ids(2, T))
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids(2, T)[:, 1:].flatten())
        gradient = torch.autograd.grad(loss, each.embedding.weight)[0]
        caches = [getattr(visit.mixer, "attention", visit.mixer) for visit in state.visits]
        results.append([logits, loss, gradient, *(z for cache in caches for z in (cache.k, cache.v, cache.position))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@with_settings
def test_p1_at_zero_padded_logits_and_greedy_text_are_the_backbones_bit_for_bit(settings):
    plain, x = backbone(), ids(2, 9)
    model = titanize(plain, **settings)
    for mask in (None, torch.tensor([[0] * 3 + [1] * 6, [1] * 9]), torch.tensor([[1] * 6 + [0] * 3, [1] * 9])):
        want, got = (face(each)(x, attention_mask=mask, labels=x) for each in (plain, model))
        assert torch.equal(got.logits, want.logits)
        assert torch.equal(got.loss, want.loss)
        assert greedy(model, x, attention_mask=mask) == greedy(plain, x, attention_mask=mask)


def test_p1_at_zero_a_family_with_its_own_windows_keeps_them():
    plain = backbone(AttentionConfig(num_heads=2, window=4), AttentionConfig(num_heads=2, window=6, num_sinks=1))
    assert torch.equal(titanize(plain, window=5, num_sinks=3)(ids(2, T))[0], plain(ids(2, T))[0])


# P4 … P8: one function for every cut


@with_weights
@with_settings
def test_p4_logits_of_a_prefix_do_not_depend_on_what_follows(settings, mag):
    model = titanize(backbone(), mag_weight=mag, **settings)
    with torch.no_grad():
        want, _ = model(ids(2, T))
        for n in (1, 2, 3, 5, 7, 11, 13, 19, T - 1):
            assert_close(model(ids(2, T)[:, :n])[0], want[:, :n], 1e-5)
            other = torch.cat([ids(2, T)[:, :n], ids(2, T, seed=9)[:, n:]], 1)
            assert torch.equal(model(other)[0][:, :n], want[:, :n])


@with_weights
@with_settings
def test_p5_prefill_and_single_tokens_give_the_logits_of_reading_all_at_once(settings, mag):
    model, x = titanize(backbone(), mag_weight=mag, **settings), ids(2, T)
    with torch.no_grad():
        want, _ = model(x)
        for p in range(1, T):
            logits, state = model(x[:, :p])
            pieces = [logits]
            for t in range(p, T):
                logits, state = model(x[:, t : t + 1], state)
                pieces.append(logits)
            assert_close(torch.cat(pieces, 1), want, 1e-4)


@with_weights
@with_settings
def test_p5_greedy_text_is_the_same_with_and_without_a_cache(settings, mag):
    model = titanize(backbone(dtype=torch.float64), mag_weight=mag, **settings)
    assert greedy(model, ids(2, 7), use_cache=True) == greedy(model, ids(2, 7), use_cache=False)


@with_weights
@with_settings
def test_p7_padding_on_either_side_changes_no_logit_nor_later_text(settings, mag):
    model, x = face(titanize(backbone(dtype=torch.float64), mag_weight=mag, **settings)), ids(3, 9)
    mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 5 + [0] * 4, [1] * 9])
    more = ids(3, 4, seed=4)
    with torch.no_grad():
        out = model(x, attention_mask=mask, use_cache=True)
        steps = [
            model(more[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True).logits for t in range(4)
        ]
        for row, keep in enumerate(mask.bool()):
            alone = model(torch.cat([x[row][keep], more[row]])[None]).logits[0]
            assert_close(torch.cat([out.logits[row][keep], *(s[row] for s in steps)]), alone, 1e-9)


@pytest.mark.parametrize(("mag", "window"), [(1.0, None), (0.3, 5)])
def test_p8_decoding_memory_stops_growing_and_still_tells_prompts_apart(mag, window):
    model = titanize(backbone(), mag_weight=mag, window=window, num_sinks=1 if window else 0)
    with torch.no_grad():
        sizes, logits = [], []
        for seed in (1, 2):  # the sink token and the last 20 are the same: the difference has left every window
            prompt = torch.cat([ids(1, 1), ids(1, 79, seed=seed), ids(1, 20)], 1)
            _, state = model(prompt)
            sizes.append(state.num_bytes)
            logits.append(model(ids(1, 1), state)[0])
            sizes.append(model(ids(1, 900), state)[1].num_bytes)
        assert len(set(sizes)) == 1
        assert (logits[0] - logits[1]).abs().max() > 1e-4


def test_p8_bytes_are_what_the_page_says():
    model = titanize(backbone(), mag_weight=1.0, order=2, conv_width=3)
    heads, kv, d = 4, 2, 4
    memory, conv, tail = kv * d * d, 2 * (heads + 2 * kv) * d, kv * 2 * d
    assert model.init_state(1).num_bytes == 2 * (4 * (memory + conv + tail) + 8 * 3) + 8


def recall_task(batch: int, generator: torch.Generator, pairs: int = 6, keys: int = 16) -> Tensor:
    """Different keys with a value each, then the same pairs in another order, whose values are known by then."""
    key = torch.rand(batch, keys, generator=generator).argsort(1)[:, :pairs]
    value = torch.randint(keys, 2 * keys, (batch, pairs), generator=generator)
    again = torch.rand(batch, pairs, generator=generator).argsort(1)
    halves = [torch.stack([key, value], 2), torch.stack([key.gather(1, again), value.gather(1, again)], 2)]
    return torch.cat(halves, 1).flatten(1)


def test_p8_after_a_short_training_the_memory_alone_recalls_far_above_chance():
    two_heads = AttentionConfig(num_heads=2)
    plain = backbone(two_heads, two_heads, vocab_size=32, d_model=32, init_std=0.1)
    model = titanize(plain, mag_weight=1.0, conv_width=3, output_norm="rms")
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    generator, asked = torch.Generator().manual_seed(1), slice(12, -1, 2)
    for _ in range(120):
        text = recall_task(32, generator)
        logits, _ = model(text)
        loss = torch.nn.functional.cross_entropy(logits[:, asked].flatten(0, 1), text[:, 13::2].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    text = recall_task(256, generator)
    with torch.no_grad():
        right = (model(text)[0][:, asked].argmax(-1) == text[:, 13::2]).float().mean()
    assert right > 0.5  # a value that was seen at all: 1/6; any value: 1/16


# P12: generation


@with_weights
def test_p12_generating_twice_gives_the_same_text_and_other_batches_do_not_disturb_it(mag):
    model = titanize(backbone(dtype=torch.float64), mag_weight=mag, order=2, window=5)
    want = greedy(model, ids(2, 7))
    greedy(model, ids(3, 5, seed=8))
    assert greedy(model, ids(2, 7)) == want
    assert greedy(model, ids(2, 7)[:1]) == want[:1]


@with_weights
def test_p12_beam_search_with_a_cache_equals_beam_search_without(mag):
    model = titanize(backbone(dtype=torch.float64), mag_weight=mag, order=2, window=5)
    texts = [greedy(model, ids(2, 7), num_beams=3, use_cache=cache) for cache in (True, False)]
    assert texts[0] == texts[1]


# P13: which layers, and back


def test_p13_only_the_listed_layers_have_a_memory():
    model = titanize(backbone(*[ATTENTION] * 4), layers=[1, 3])
    assert [block.mixer.kind for block in model.config.blocks] == ["attention", "liza", "attention", "liza"]
    assert list(mag_weights(model)) == [1, 3]


def test_p13_listing_no_layer_leaves_the_backbone():
    plain = backbone()
    model = titanize(plain, layers=[], mag_weight=1.0)
    assert model.config == plain.config
    assert torch.equal(model(ids(2, T))[0], plain(ids(2, T))[0])


@with_settings
def test_p13_restoring_gives_the_same_keys_tensors_and_config(settings):
    plain = backbone(dtype=torch.bfloat16)
    before = {name: t.clone() for name, t in plain.state_dict().items()}
    back = restore_backbone(titanize(plain, mag_weight=0.7, **settings))
    assert back.config == plain.config
    assert list(back.state_dict()) == list(before)
    assert all(torch.equal(t, before[name]) and t.dtype == before[name].dtype for name, t in back.state_dict().items())


def test_p13_restoring_after_a_save_and_a_load_gives_the_same_tensors(tmp_path):
    plain = backbone()
    plain.origin = {"family": "llama", "config": {"hidden_size": 16}}
    titanize(plain, mag_weight=0.4).save(tmp_path / "m")
    back = restore_backbone(load(tmp_path / "m"))
    assert back.origin == plain.origin
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), plain.parameters(), strict=True))


def test_in_a_hybrid_all_means_every_attention_layer():
    model = titanize(backbone(DeltaConfig(num_heads=2, head_dim=4), ATTENTION, ATTENTION))
    assert list(liza_layers(model)) == [1, 2]


def test_a_block_visited_twice_keeps_one_state_per_visit():
    plain = backbone(order=(0, 1, 0))
    model = titanize(plain, mag_weight=0.5)
    assert len(model.init_state(1).visits) == 3
    with torch.no_grad():
        want, _ = model(ids(1, T))
        first, state = model(ids(1, T)[:, :9])
        assert_close(torch.cat([first, model(ids(1, T)[:, 9:], state)[0]], 1), want, 1e-5)


@pytest.mark.parametrize(
    ("mixers", "layers", "message"),
    [
        ([DeltaConfig(num_heads=2, head_dim=4), ATTENTION], [0, 1], r"layer\(s\) 0 \(delta\) are no attention"),
        ([DeltaConfig(num_heads=2, head_dim=4)], "all", "this model has no attention layer; its layers are delta"),
        ([LizaConfig(num_heads=4)], "all", r"its layers are liza\. To convert anew, call restore_backbone first"),
        ([ATTENTION], [1], "there is no layer 1; this model has 0 to 0"),
        ([ATTENTION, LizaConfig(num_heads=4)], "1", r"1 \(liza\) are no attention.*call restore_backbone first"),
    ],
)
def test_layers_that_cannot_be_titanized_are_refused_by_number_and_kind(mixers, layers, message):
    with pytest.raises(ValueError, match=message):
        titanize(backbone(*mixers), layers=layers)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 2.5}, r"liza: memory_window must be int \| None, got float 2\.5"),  # no folder would hold it
        ({"mag_weight": "0.5"}, "liza: mag_weight must be float, got str '0.5'"),
        ({"order": 1.5}, r"liza: order must be int, got float 1\.5"),
    ],
)
def test_settings_of_another_type_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        titanize(backbone(), **settings)


def test_a_decoder_of_transformers_is_refused_with_what_to_give():
    decoder = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=4, n_layer=1, n_head=1, vocab_size=5))
    with pytest.raises(ValueError, match=r"got GPT2LMHeadModel. Give the name .* or the folder of its save_pretrained"):
        titanize(decoder)


# The new Model


def test_the_new_model_shares_the_backbones_tensors_and_leaves_the_old_as_it_was():
    plain = backbone()
    config, names = plain.config, list(plain.state_dict())
    model = titanize(plain)
    assert model.blocks[0].mixer.qkv.weight.data_ptr() == plain.blocks[0].mixer.qkv.weight.data_ptr()
    assert (plain.config, list(plain.state_dict())) == (config, names)
    model.requires_grad_(False)
    assert plain.embedding.weight.requires_grad


def test_the_seed_alone_decides_the_new_memories():
    plain, drawn = backbone(), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed * 7 + len(drawn))
        before = torch.get_rng_state()
        drawn.append(titanize(plain, seed=seed).blocks[1].mixer.memory.beta.weight)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_p15_memories_of_a_bfloat16_backbone_are_float32():
    model = titanize(backbone(dtype=torch.bfloat16), mag_weight=0.3)
    wide = {name.split(".")[3] for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert wide == {"memory", "mag"}
    for context in (contextlib.nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with context, torch.no_grad():
            logits, state = model(ids(2, T))
            assert logits.isfinite().all()
            assert state.visits[0].mixer.memory.matrix.memory.dtype == torch.float32


def test_a_saved_model_keeps_its_weights_of_the_memory(tmp_path):
    model = titanize(backbone(dtype=torch.bfloat16), mag_weight=0.3)
    set_mag_weight(model, {1: [0.1, 0.2, 0.3, 0.4]})
    model.save(tmp_path / "m")
    again = load(tmp_path / "m")
    assert mag_weights(again) == mag_weights(model)
    assert torch.equal(again(ids(2, T))[0], model(ids(2, T))[0])


def test_titanize_takes_a_face_and_a_model_folder(tmp_path):
    plain = backbone()
    plain.save(tmp_path / "m")
    want = titanize(plain, mag_weight=0.5)(ids(2, T))[0]
    assert torch.equal(titanize(face(plain), mag_weight=0.5)(ids(2, T))[0], want)
    assert torch.equal(titanize(str(tmp_path / "m"), mag_weight=0.5)(ids(2, T))[0], want)


@pytest.mark.parametrize(("text", "message"), [("[]", "must hold a JSON object"), ("{", "is not JSON")])
def test_a_damaged_config_is_refused_by_its_path(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"config\.json {message}"):
        titanize(tmp_path)


def test_a_model_with_adapters_in_it_is_refused():
    plain = backbone()
    plain.blocks[0].mixer.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"not its own: blocks.0.mixer.extra.weight.*Merge adapters first"):
        titanize(plain)


def test_a_quantised_model_is_refused():
    plain = backbone()
    plain.blocks[0].mixer.qkv.weight = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"quantised: blocks.0.mixer.qkv.weight \(torch.uint8\)"):
        titanize(plain)


def test_the_order_of_the_blocks_is_kept():
    model = backbone().set_order((0, 1, 0, 1))
    tokens = ids(2, 9)
    for changed in (titanize(model, mag_weight=0.0), restore_backbone(titanize(model)), add_in_place_memory(model)):
        assert changed.visits == model.visits
        assert torch.equal(changed(tokens)[0], model(tokens)[0])
