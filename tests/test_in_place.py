"""The feed-forward with In-Place memory: under every law of the mixers, alone and in a whole model."""

import subprocess
import sys
import textwrap
from dataclasses import replace

import laws.laws as book
import pytest
import torch
from laws.laws import LAWS, Subject
from safetensors.torch import load_file
from tolerances import assert_close, relative_error
from torch import nn

from fastweight import BlockConfig, FeedForwardConfig, Model, ModelConfig, load
from fastweight.generate import generate
from fastweight.in_place import InPlaceFeedForward
from fastweight.layers import FEED_FORWARDS, FeedForward, InPlaceConfig
from fastweight.mixers.attention import AttentionConfig
from fastweight.mixers.delta import DeltaConfig
from fastweight.ops.in_place import in_place
from fastweight.state import ModelState

MEMORY = InPlaceConfig(chunk_size=8, inner_lr=0.5)
CASES = {
    "swiglu": FeedForwardConfig(hidden=12, memory=MEMORY),
    "relu2 with biases, chunks of five": FeedForwardConfig(
        kind="relu2", hidden=10, bias=True, memory=InPlaceConfig(chunk_size=5, inner_lr=0.1, projection=False)
    ),
    "without bound": FeedForwardConfig(
        kind="geglu", hidden=9, memory=InPlaceConfig(chunk_size=14, inner_lr=0.3, max_norm=None)
    ),
    "embedding": FeedForwardConfig(hidden=12, memory=replace(MEMORY, target="embedding")),
}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


class Alone(InPlaceFeedForward):
    """The feed-forward as the laws take a mixer; the embeddings that it may need are a fixed function of its input."""

    def parallel(self, x, state, **options):
        return super().parallel(x, state, embedded=x.roll(1, -1) * 0.5, **options)

    def step(self, x, state):
        return self.parallel(x, state)


def subjects():
    """As for mixers: bit-exactness does not depend on precision, and reach is told best with many digits."""
    for law in LAWS:
        for case, config in CASES.items():
            for backend in ("naive", "chunked"):
                if law == "backends" and backend == "naive":
                    continue
                for dtype in DTYPES:
                    # With biases a plain bfloat16 product already rounds differently for different numbers of tokens.
                    if config.bias and dtype == "bfloat16":
                        continue
                    if dtype != {"causal": "float32", "frozen": "float32", "far": "float64"}.get(law, dtype):
                        continue
                    yield pytest.param(law, config, backend, DTYPES[dtype], id=f"{law}-{case}-{backend}-{dtype}")


@pytest.mark.parametrize(("law", "config", "backend", "dtype"), list(subjects()))
def test_the_law_holds(law, config, backend, dtype):
    LAWS[law](Subject(Alone, config, backend, dtype))


class Hasty(Alone):
    """Deliberately wrong: every call ends the chunk."""

    def parallel(self, x, state, **options):
        return super().parallel(x, state._replace(pending=torch.zeros_like(state.pending)), **options)


class Shared(Alone):
    """Deliberately wrong: every sequence reads the first one's memory."""

    def parallel(self, x, state, **options):
        return super().parallel(x, state._replace(memory=state.memory[:1].expand_as(state.memory)), **options)


@pytest.mark.parametrize(("wrong", "law"), [(Hasty, "split"), (Hasty, "step"), (Shared, "packed"), (Shared, "rows")])
def test_a_wrong_memory_breaks_the_law(wrong, law):
    with pytest.raises(AssertionError):
        LAWS[law](Subject(wrong, CASES["swiglu"], "chunked", torch.float64))


def plain_of(part: InPlaceFeedForward, config: FeedForwardConfig) -> FeedForward:
    plain = FeedForward(book.D_MODEL, replace(config, memory=None)).to(part.down.weight.dtype)
    plain.load_state_dict({n: t for n, t in part.state_dict().items() if not n.startswith("memory.")})
    return plain


@pytest.mark.parametrize("kind", FEED_FORWARDS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_with_zero_taps_it_is_the_plain_feed_forward_bit_for_bit(kind, dtype):
    config = FeedForwardConfig(kind=kind, hidden=12, bias=True, memory=MEMORY)
    part = InPlaceFeedForward(book.D_MODEL, config)
    part.reset_parameters(0.3)
    part, x = part.to(dtype), torch.randn(2, 40, book.D_MODEL).to(dtype)
    y, state = part.parallel(x, part.init_state(2))
    assert torch.equal(y, plain_of(part, config)(x))
    assert not state.memory.any()


def test_frozen_it_is_the_plain_feed_forward_bit_for_bit():
    subject = Subject(Alone, CASES["swiglu"], "chunked", torch.float32)
    part, x = subject.build(), subject.tokens(2)
    part.learning = False
    assert torch.equal(book.whole(part, x)[0], plain_of(part, CASES["swiglu"])(x))


def test_in_bfloat16_the_memory_is_added_before_the_one_rounding():
    subject = Subject(Alone, CASES["swiglu"], "chunked", torch.bfloat16)
    part, x = subject.build(), subject.tokens(2)
    y, base = book.whole(part, x)[0], plain_of(part, CASES["swiglu"])(x)
    # The oracle adds in float32 what the memory reads from the same activations.
    read, _ = in_place(
        part.hidden(x), x, part.memory.taps, part.memory.projection, part.down.weight,
        part.init_state(2), chunk_size=8, inner_lr=0.5, max_norm=1.0, backend="naive",
    )  # fmt: skip
    want = (base.float() + read).bfloat16()
    twice = base + read.bfloat16()
    assert (y == want).float().mean() > 0.99
    assert (twice == want).float().mean() < 0.9


def test_a_rate_of_zero_is_the_plain_feed_forward():
    config = replace(CASES["swiglu"], memory=replace(MEMORY, inner_lr=0.0))
    subject = Subject(Alone, config, "chunked", torch.float32)
    part, x = subject.build(), subject.tokens(2)
    assert torch.equal(book.whole(part, x)[0], plain_of(part, config)(x))


def test_a_token_changes_no_other_output_of_its_chunk_nor_of_earlier_chunks():
    subject = Subject(Alone, CASES["swiglu"], "chunked", torch.float64)
    part, x = subject.build(), subject.tokens(1)
    before = book.whole(part, x)[0][0]
    changed = x.clone()
    changed[0, 18] += 1  # in the third chunk of eight
    after = book.whole(part, changed)[0][0]
    moved = (after != before).any(-1).nonzero().flatten().tolist()
    assert moved == [18, *range(24, book.LENGTH)]


def test_the_projection_starts_diagonal_and_the_taps_get_a_gradient():
    part = InPlaceFeedForward(64, FeedForwardConfig(hidden=32, memory=MEMORY))
    part.reset_parameters(0.3)
    projection = part.memory.projection
    assert projection is not None
    assert torch.equal(projection, projection.diagonal().diag())
    assert 0.01 < projection.diagonal().std() < 0.03
    y, _ = part.parallel(torch.randn(1, 20, 64), part.init_state(1))
    y.square().sum().backward()
    assert part.memory.taps.grad is not None
    assert part.memory.taps.grad.abs().max() > 0


def test_a_target_of_embeddings_must_be_given():
    part = InPlaceFeedForward(8, FeedForwardConfig(hidden=12, memory=replace(MEMORY, target="embedding")))
    with pytest.raises(ValueError, match="needs the tokens' embeddings"):
        part.parallel(torch.randn(1, 2, 8), part.init_state(1))


def test_a_packed_weight_is_refused():
    part = InPlaceFeedForward(8, FeedForwardConfig(hidden=12, memory=MEMORY))
    part.down.weight = nn.Parameter(torch.zeros(48, 1))
    with pytest.raises(ValueError, match=r"must be \[8, 12\], got \[48, 1\].*leave `down` out"):
        part.init_state(1)


def test_an_adapter_on_the_down_projection_reads_with_it_and_merges():
    peft = pytest.importorskip("peft")
    model = model_of(replace(MEMORY, max_norm=None)).double()
    plain = model(tokens())[0]
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["down"]), model)
    assert torch.equal(model(tokens())[0], plain)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    adapted = model(tokens())[0]
    assert relative_error(adapted, plain) > 1e-3
    for block in model.blocks:
        block.feed_forward.down.merge()
        block.feed_forward.down = block.feed_forward.down.get_base_layer()
    assert_close(model(tokens())[0], adapted, 1e-10)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"chunk_size": 0}, "chunk_size must be positive"),
        ({"chunk_size": 2.5}, "chunk_size must be int"),
        ({"inner_lr": float("nan")}, "inner_lr must be finite"),
        ({"target": "hiden"}, "Did you mean hidden"),
        ({"max_norm": 0.0}, "max_norm must be positive"),
    ],
)
def test_a_bad_setting_is_named(bad, message):
    with pytest.raises(ValueError, match=message):
        InPlaceConfig(**bad)


# --- in a whole model ---------------------------------------------------------------------------------------------


def model_of(memory: InPlaceConfig | None = MEMORY, *, attention: bool = False, **changes) -> Model:
    torch.manual_seed(0)
    feed_forward = FeedForwardConfig(hidden=24, memory=memory)
    mixer = AttentionConfig(num_heads=2, window=4) if attention else DeltaConfig(num_heads=2, head_dim=4)
    block = BlockConfig(mixer=mixer, feed_forward=feed_forward)
    blocks = (block, replace(block, feed_forward=FeedForwardConfig(hidden=24)))
    model = Model(ModelConfig(**{"vocab_size": 31, "d_model": 16, "blocks": blocks, "init_std": 0.3} | changes))
    with torch.no_grad():
        for memory_ in model.memories():
            if isinstance(memory_, InPlaceFeedForward):
                nn.init.normal_(memory_.memory.taps, std=0.3)
                assert memory_.memory.projection is not None
                nn.init.normal_(memory_.memory.projection, std=0.3)
    return model


EMBEDDING = replace(MEMORY, target="embedding")
BOTH = pytest.mark.parametrize("memory", [MEMORY, EMBEDDING], ids=["hidden", "embedding"])


def tokens(batch: int = 2, length: int = 38) -> torch.Tensor:
    return torch.randint(0, 31, (batch, length), generator=torch.Generator().manual_seed(5))


@BOTH
@pytest.mark.parametrize("cuts", [(5, 6, 8, 21), tuple(range(1, 38))], ids=["pieces", "tokens"])
def test_a_model_reads_in_pieces_as_at_once(memory, cuts):
    model = model_of(memory, order=(0, 1, 0)).double()
    want, end = model(tokens())
    state, outputs = None, []
    for a, b in zip((0, *cuts), (*cuts, 38)):
        logits, state = model(tokens()[:, a:b], state)
        outputs.append(logits)
    assert_close(torch.cat(outputs, 1), want, 1e-10)
    assert state is not None
    assert state.num_bytes == end.num_bytes


@BOTH
def test_packed_documents_are_read_as_alone(memory):
    model, ends = model_of(memory).double(), torch.tensor([0, 17, 18, 38])
    packed, _ = model(tokens(1), cu_seqlens=ends)
    alone = [model(tokens(1)[:, a:b])[0] for a, b in zip(ends, ends[1:])]
    assert_close(packed, torch.cat(alone, 1), 1e-10)


@BOTH
def test_a_model_learns_from_scratch_to_use_it(memory):
    """Each text is seven random tokens, repeated: log 31 = 3.4 nats without remembering them."""
    torch.manual_seed(1)
    model = model_of(replace(memory, inner_lr=0.3), attention=True, init_std=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def loss() -> torch.Tensor:
        text = torch.randint(0, 31, (8, 7)).repeat(1, 6)
        return nn.functional.cross_entropy(model(text[:, :-1])[0][:, 14:].flatten(0, 1), text[:, 15:].flatten())

    for _ in range(120):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert loss() < 1
    with model.frozen_memory():
        assert loss() > 3


def test_the_embedding_target_is_what_the_first_block_reads():
    model, seen = model_of(EMBEDDING, order=(1, 0)), []
    part = model.memories()[1]
    assert isinstance(part, InPlaceFeedForward)
    read = part.parallel
    part.parallel = lambda x, state, **options: seen.append(options["embedded"]) or read(x, state, **options)
    model(tokens())
    assert torch.equal(seen[0], model.embedding(tokens()))


def test_the_two_targets_are_different_functions():
    hidden, embedding = (model_of(memory)(tokens())[0] for memory in (MEMORY, EMBEDDING))
    assert torch.equal(hidden[:, :8], embedding[:, :8])
    assert relative_error(hidden[:, 8:], embedding[:, 8:]) > 1e-3


def test_frozen_memory_turns_it_off_and_on_again():
    model, without = model_of(attention=True), model_of(None, attention=True)
    without.load_state_dict({n: t for n, t in model.state_dict().items() if ".memory." not in n})
    learning = model(tokens())[0]
    with model.frozen_memory():
        assert torch.equal(model(tokens())[0], without(tokens())[0])
    assert torch.equal(model(tokens())[0], learning)
    assert not torch.equal(learning, without(tokens())[0])


def test_set_backend_reaches_it():
    model = model_of().set_backend("naive")
    assert [memory.backend for memory in model.memories()] == ["naive"] * 3


@BOTH
def test_checkpointing_changes_no_gradient_also_when_it_was_frozen(memory):
    grads = []
    for on in (False, True):
        model = model_of(memory).double()
        model.checkpointing = on
        loss = model(tokens())[0].square().sum()
        with model.frozen_memory():
            loss = loss + model(tokens())[0].pow(3).sum()
        loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_saved_model_comes_back_bit_for_bit(tmp_path):
    model = model_of(EMBEDDING)
    model.save(tmp_path)
    loaded = load(tmp_path)
    assert loaded.config == model.config
    assert torch.equal(loaded(tokens())[0], model(tokens())[0])


def test_a_new_process_continues_a_saved_state_in_the_middle_of_a_chunk_bit_for_bit(tmp_path):
    model = model_of(EMBEDDING)
    model.save(tmp_path / "model")
    with torch.no_grad():
        _, state = model(tokens()[:, :21])
        state.save(tmp_path / "state")
        want, _ = model(tokens()[:, 21:], state)
    script = textwrap.dedent("""
        import sys, torch
        from safetensors.torch import save_file
        from fastweight import load, load_state
        torch.set_num_threads(1)
        tokens = torch.randint(0, 31, (2, 38), generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            logits, _ = load(sys.argv[1] + "/model")(tokens[:, 21:], load_state(sys.argv[1] + "/state"))
        save_file({"logits": logits.contiguous()}, sys.argv[1] + "/logits")
    """)
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=200)
    assert torch.equal(load_file(tmp_path / "logits")["logits"], want)


def test_a_state_without_the_memory_is_refused():
    _, state = model_of(None)(tokens())
    with pytest.raises(ValueError, match="belongs to another model"):
        model_of()(tokens(), state)


def test_faults_name_the_feed_forward():
    model, state = model_of(), model_of().init_state(2)
    spoiled = state.visits[0].feed_forward._replace(spoiled=torch.tensor([False, True]))
    broken = state.visits[0]._replace(feed_forward=spoiled)
    _, state = model(tokens(), ModelState((broken, *state.visits[1:]), state.position, state.signature))
    assert model.describe_faults(state) == [
        "visit 0 (block 0, in-place feed-forward): 1 inner update(s) of sequence 1 were not finite and were skipped, "
        "the first at position 0"
    ]


def test_generation_takes_constant_memory_and_says_what_reading_says():
    model, prompt = model_of(attention=True), tokens(1, 13)[0].tolist()
    sizes = set()
    generation = generate(model, prompt, temperature=0, max_tokens=40)
    text = list(prompt)
    for token in generation:
        text.append(token)
        sizes.add(generation.state.num_bytes)
    assert len(sizes) == 1
    with torch.no_grad():
        logits, _ = model(torch.tensor([text[:-1]]))
    assert logits[0, 12:].argmax(-1).tolist() == text[13:]


def face_of(model: Model):
    return pytest.importorskip("fastweight.hf").FastweightForCausalLM.from_model(model).eval()


@BOTH
def test_the_hugging_face_model_generates_a_padded_batch_as_each_prompt_alone(memory):
    model, ids = model_of(memory, attention=True).double(), tokens(2, 13)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    got = face_of(model).generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)[:, 13:].tolist()
    prompts = ids[0, 4:].tolist(), ids[1].tolist()
    assert got == [list(generate(model, prompt, temperature=0, max_tokens=12)) for prompt in prompts]


def test_the_hugging_face_model_is_saved_and_loaded(tmp_path):
    face = face_of(model_of(EMBEDDING))
    face.save_pretrained(tmp_path)
    loaded = type(face).from_pretrained(tmp_path).eval()
    assert loaded.to_model().config == face.to_model().config
    assert torch.equal(loaded(tokens()).logits, face(tokens()).logits)


def test_the_config_survives_json():
    config = model_of(EMBEDDING).config
    assert ModelConfig.from_dict(config.to_dict()) == config
    broken = config.to_dict()
    broken["blocks"][0]["feed_forward"]["memory"]["chunk_sise"] = 4
    with pytest.raises(ValueError, match="chunk_size"):
        ModelConfig.from_dict(broken)
