"""Properties of converted models over whole models: every backend, mask and mode, texts longer than a solved block."""

import pytest
import torch
from convert.liza_cases import ATTENTION, T, backbone, face, ids
from mixers.liza_cases import build, tokens
from mixers.test_liza_operator import OPERATORS, by_loop
from tolerances import assert_close, assert_trees_close

from fastweight import InPlaceConfig, load
from fastweight.convert.in_place import add_in_place_memory, remove_in_place_memory
from fastweight.convert.mag import liza_layers, mag_weights, set_mag_weight
from fastweight.convert.titanize import restore_backbone, titanize
from fastweight.hf import FastweightForCausalLM
from fastweight.mixers.liza import LizaConfig
from fastweight.ops.delta.chunked import BLOCK
from fastweight.train import LoraConfig
from fastweight.train.lora import add_adapters, merge_and_unload

LONG = 2 * BLOCK + 3  # the memory's blocks end within the text
MASKS = {
    "none": None,
    "left": [[0] * 3 + [1] * 6, [1] * 9],
    "right": [[1] * 6 + [0] * 3, [1] * 9],
    "both": [[0] * 2 + [1] * 4 + [0] * 3, [0] + [1] * 8],
}
# Every way in which a memory may be written and read.
WAYS = {
    "plain": {"gated": False},
    "rope": {"positions": "rope", "window": 9, "num_sinks": 2},
    "derivative": {"order": 2, "conv_width": 3},
    "rotative": {"order": 2, "trick": "rotative", "feature_map": "identity"},
    "combined": {"order": 3, "trick": "combined", "feature_map": "softmax"},
    "hedgehog": {"feature_map": "hedgehog", "output_norm": "rms", "window": 70},
}
with_ways = pytest.mark.parametrize("settings", WAYS.values(), ids=WAYS)
with_weights = pytest.mark.parametrize("mag", [0.3, 1.0])


def caches(state) -> list[torch.Tensor]:
    """Keys, values and positions of every attention layer."""
    found = [getattr(visit.mixer, "attention", visit.mixer) for visit in state.visits]
    return [z for cache in found for z in (cache.k, cache.v, cache.position)]


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_p1_at_zero_everything_is_the_backbones_for_every_backend_mask_and_mode(backend, training, mask, monkeypatch):
    plain, x = backbone(), ids(2, 9)
    model = titanize(plain, mag_weight=0.5, window=4)
    set_mag_weight(model, 0.0)
    for mixer in liza_layers(model).values():
        monkeypatch.setattr(mixer.memory, "forward", lambda *a, **k: pytest.fail("the memory ran"))
    mask = None if mask is None else torch.tensor(mask)
    valid = torch.ones_like(x).bool() if mask is None else mask.bool()
    found, texts = [], []
    for each in (plain, model):
        one = face(each.set_backend(backend)).train(training)
        out = one(x, attention_mask=mask, labels=x, use_cache=True)
        out.loss.backward()
        gradients = [one.model.get_parameter(name).grad.clone() for name, _ in plain.named_parameters()]
        one.zero_grad()
        found.append([out.logits[valid], out.loss, *caches(out.past_key_values.state), *gradients])
        texts.append(one.eval().generate(x, attention_mask=mask, max_new_tokens=8, do_sample=False))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert torch.equal(*texts)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_p1_a_read_folder_at_zero_is_the_backbone_under_either_name_of_attention(attention, tmp_path):
    plain, x = backbone(), ids(2, 9)
    face(titanize(plain)).save_pretrained(tmp_path)
    read = FastweightForCausalLM.from_pretrained(tmp_path, attn_implementation=attention).eval()
    assert torch.equal(read(x).logits, face(plain)(x).logits)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_an_attention_that_cannot_honour_every_mask_is_refused(attention, tmp_path):
    face(titanize(backbone())).save_pretrained(tmp_path)
    with pytest.raises((ValueError, ImportError)):
        FastweightForCausalLM.from_pretrained(tmp_path, attn_implementation=attention)


@pytest.mark.parametrize("case", ["order2", "order3_hedgehog"])
def test_p2_in_float32_and_over_several_blocks_the_memory_equals_the_loop_with_its_gradients(case):
    config = LizaConfig(num_heads=2, num_kv_heads=1, mag_weight=1.0, **OPERATORS[case])
    results = []
    for dtype in (torch.float32, torch.float64):
        mixer, x = build(config, dtype), tokens(LONG, 1, torch.float32).to(dtype).requires_grad_()
        state = mixer.init_state(1).memory
        first = torch.randn(state.matrix.memory.shape, generator=torch.Generator().manual_seed(6)).to(dtype)
        first.requires_grad_()
        if dtype == torch.float64:
            y, memory = by_loop(mixer, x[0], first[0])
        else:
            start = state._replace(matrix=state.matrix._replace(memory=first))
            heads, after = mixer.memory(x, *mixer.project_unrotated(x), start, None, backend="chunked", learning=True)
            y, memory = heads[0], after.matrix.memory[0]
        (y.sin().sum() + memory.sin().sum()).backward()
        results.append([y, memory, x.grad, first.grad, mixer.memory.beta.weight.grad, mixer.qkv.weight.grad])
    for got, want in zip(*results, strict=True):
        assert_close(got.double(), want, 1e-5)


@with_weights
@with_ways
def test_p4_no_logit_depends_on_later_tokens_also_across_blocks(settings, mag):
    model, x = titanize(backbone(), mag_weight=mag, **settings), ids(1, LONG)
    with torch.no_grad():
        want, _ = model(x)
        for n in (1, 2, 31, BLOCK - 1, BLOCK, BLOCK + 1, 97, 2 * BLOCK - 1, 2 * BLOCK, LONG - 1):
            assert_close(model(x[:, :n])[0], want[:, :n], 1e-5)
            other = torch.cat([x[:, :n], ids(1, LONG, seed=9)[:, n:]], 1)
            assert torch.equal(model(other)[0][:, :n], want[:, :n])


@with_weights
@with_ways
def test_p5_p6_any_cut_across_blocks_gives_the_logits_and_the_state_of_reading_at_once(settings, mag):
    model, x = titanize(backbone(), mag_weight=mag, **settings), ids(2, LONG)
    with torch.no_grad():
        want, state = model(x)
        for cut in (1, 7, BLOCK - 1, BLOCK, BLOCK + 1, LONG - 1):
            first, middle = model(x[:, :cut])
            rest, after = model(x[:, cut:], middle)
            assert_close(torch.cat([first, rest], 1), want, 1e-5)
            assert_trees_close(after.visits, state.visits, 1e-5)
            assert torch.equal(after.position, state.position)
        logits, state = model(x[:, : BLOCK - 2])
        pieces = [logits]
        for t in range(BLOCK - 2, BLOCK + 8):
            logits, state = model(x[:, t : t + 1], state)
            pieces.append(logits)
        assert_close(torch.cat(pieces, 1), want[:, : BLOCK + 8], 1e-4)


@with_ways
def test_p7_rows_of_different_lengths_decode_side_by_side_as_alone(settings):
    """Rows stand at different positions and blocks; padding is on the left, on the right, and on both sides."""
    model, x = face(titanize(backbone(), mag_weight=0.3, **settings)), ids(4, BLOCK + 5)
    lengths, starts = (BLOCK + 5, BLOCK, 3, 17), (0, 5, 0, 20)
    mask = torch.zeros_like(x)
    for row, (start, length) in enumerate(zip(starts, lengths)):
        mask[row, start : start + length] = 1
    more = ids(4, 3, seed=4)
    with torch.no_grad():
        out = model(x, attention_mask=mask, use_cache=True)
        steps = [model(more[:, t, None], past_key_values=out.past_key_values, use_cache=True).logits for t in range(3)]
        for row, keep in enumerate(mask.bool()):
            alone = model(torch.cat([x[row][keep], more[row]])[None]).logits[0]
            assert_close(torch.cat([out.logits[row][keep], *(s[row] for s in steps)]), alone, 1e-5)


@pytest.mark.parametrize(("mag", "window"), [(1.0, None), (0.3, 5)])
def test_p8_a_generating_cache_is_as_large_after_a_thousand_tokens_as_after_a_hundred(mag, window):
    model = face(titanize(backbone(ATTENTION), mag_weight=mag, window=window))
    sizes = []
    for count in (100, 1000):
        settings = {"max_new_tokens": count - 5, "min_new_tokens": count - 5, "do_sample": False}
        out = model.generate(ids(1, 5), return_dict_in_generate=True, **settings)
        assert out.past_key_values.get_seq_length() == count - 1
        sizes.append(out.past_key_values.state.num_bytes)
    assert sizes[0] == sizes[1]


def test_p9_in_place_memories_of_a_bfloat16_backbone_come_back_in_float32_with_every_bit(tmp_path):
    model = add_in_place_memory(backbone(dtype=torch.bfloat16), InPlaceConfig(chunk_size=4))
    torch.manual_seed(4)
    for block in model.blocks:
        torch.nn.init.normal_(block.feed_forward.memory.taps, std=0.3)
    face(model).save_pretrained(tmp_path)
    read = FastweightForCausalLM.from_pretrained(tmp_path).eval()
    for name, parameter in model.named_parameters():
        other = read.model.get_parameter(name)
        assert other.dtype == parameter.dtype == (torch.float32 if ".memory." in name else torch.bfloat16)
        assert torch.equal(other, parameter)
    assert torch.equal(read(ids(2, T)).logits, face(model)(ids(2, T)).logits)


def test_p13_backends_and_frozen_memories_survive_every_change_of_a_model():
    model = add_in_place_memory(titanize(backbone(), mag_weight=0.3), InPlaceConfig(chunk_size=4), layers=[1])
    model.set_backend("naive")
    model.memories()[-1].learning = False
    plain = restore_backbone(model)
    for changed in (plain, titanize(plain), add_in_place_memory(model, layers=[0])):
        assert changed.memories()[-1].learning is False
        assert {memory.backend for memory in (*changed.mixers(), changed.memories()[-1])} == {"naive"}
    assert {memory.backend for memory in remove_in_place_memory(model).memories()} == {"naive"}


@pytest.mark.parametrize("mag", [0.0, 0.3, 1.0])
def test_p15_parameters_of_a_memory_that_are_infinite_leave_every_logit_finite(mag):
    model = titanize(backbone(), mag_weight=mag)
    for mixer in liza_layers(model).values():
        for parameter in mixer.memory.parameters():
            torch.nn.init.constant_(parameter, float("inf"))
    with torch.no_grad():
        assert model(ids(2, T))[0].isfinite().all()


@pytest.mark.parametrize("mag", [0.0, 0.3, 1.0])
def test_a_model_can_be_made_and_read_in_inference_mode(mag):
    want = titanize(backbone(), mag_weight=mag)(ids(2, T))[0]
    with torch.inference_mode():
        model = titanize(backbone(), mag_weight=mag)
        assert torch.equal(model(ids(2, T))[0], want)
        set_mag_weight(model, 0.5)
        assert mag_weights(model) == {0: [0.5] * 4, 1: [0.5] * 4}


@pytest.mark.parametrize("settings", [WAYS["rope"], WAYS["derivative"]], ids=["rope", "derivative"])
def test_a_compiled_block_computes_the_same_and_follows_a_changed_weight(settings):
    model = titanize(backbone(ATTENTION), mag_weight=0.3, **settings)
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend="eager")
    with torch.no_grad():
        for mag in (0.3, 0.0, 1.0):
            set_mag_weight(model, mag)
            plain = titanize(backbone(ATTENTION), mag_weight=mag, **settings)
            assert_close(model(ids(2, T))[0], plain(ids(2, T))[0], 1e-6)


@pytest.mark.parametrize("swapped", [False, True])
def test_states_of_different_weights_cannot_be_joined(swapped):
    model, states = titanize(backbone()), []
    for mag in (0.0, 0.4):
        set_mag_weight(model, mag)
        states.append(model(ids(2, 5))[1])
    first, second = reversed(states) if swapped else states
    with pytest.raises(ValueError, match="do not hold the same parts"):
        first.where(torch.tensor([True, False]), second)


def test_a_model_with_adapters_is_not_saved_as_a_folder_that_nothing_reads(tmp_path):
    model = titanize(backbone(), mag_weight=0.4)
    add_adapters(model, LoraConfig(rank=2))
    with pytest.raises(ValueError, match=r"not its own: .*lora_A.*Merge adapters before saving"):
        model.save(tmp_path / "m")
    assert not (tmp_path / "m").exists()
    merge_and_unload(model).save(tmp_path / "m")
    assert torch.equal(load(tmp_path / "m")(ids(2, T))[0], model(ids(2, T))[0])
