"""Golden vectors of TTT-Linear and TTT-MLP, computed once with the published JAX and PyTorch code and printed.

The tolerance of each comparison is half a unit of the last printed digit and a little.
"""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from ttt_checkpoints import VOCAB, published_config, published_shapes

from fastweight.convert import import_checkpoint
from fastweight.ops.ttt import TTTWeights, new_state, ttt_linear, ttt_mlp
from fastweight.ops.ttt.naive import inner_gradient
from fastweight.state import load_state

F64 = torch.float64


def wave(fn, *shape, scale=1.0, rate=1.0, shift=0.0):
    """scale · fn(rate · n + shift), n the row-major index from 0."""
    n = torch.arange(math.prod(shape), dtype=F64).view(shape)
    return scale * fn(rate * n + shift)


def one_head():
    """Eight tokens of one head, width 4, two mini-batches of four: q, k, v, rates, τ, norm weight and bias."""
    q, k = wave(torch.sin, 8, 4, rate=0.3, shift=1), wave(torch.sin, 8, 4, rate=0.7, shift=0.1)
    v = wave(torch.cos, 8, 4, rate=0.5)
    tau = 1 / torch.arange(1, 5, dtype=F64)
    weight, bias = 1 + 0.1 * torch.arange(4, dtype=F64), 0.05 * torch.arange(4, dtype=F64)
    return [
        *(x.view(1, 8, 1, 4) for x in (q, k, v)),
        torch.full((1, 8, 1), 0.125, dtype=F64),
        tau,
        weight[None],
        bias[None],
    ]


def weights(kind):
    if kind == "linear":
        tensors = wave(torch.sin, 4, 4, scale=0.1, shift=1), wave(torch.sin, 1, 4, scale=0.01)
    else:
        second = wave(torch.cos, 16, 4, scale=0.1, shift=1), 0.02 * torch.arange(4, dtype=F64)[None]
        tensors = wave(torch.sin, 4, 16, scale=0.1, shift=1), wave(torch.sin, 1, 16, scale=0.01), *second
    return TTTWeights(*(t[None, None] for t in tensors))


ONE_HEAD = {
    "linear": {
        "o": {0: (2.342094, 0.646159, -0.430081, 1.236815), 3: (-2.465922, 0.010311, 0.394545, -1.031982),
              4: (0.917990, -0.484960, -1.432347, 0.960728), 7: (-1.406066, 1.174147, 0.139945, -1.039931)},
        "w1": (-0.450162, 0.418329, 0.116284, 0.029057), "b1": (2.576830, -0.198377, -3.052724, 0.693190),
    },
    "mlp": {
        "o": {0: (-0.170866, 2.389804, 1.953570, -0.139297), 3: (-2.013968, 0.066177, 0.521963, -1.823581),
              4: (-1.371546, 0.937337, 1.444476, -0.860330), 7: (-0.996144, 0.795649, 0.842523, -1.886640)},
        "w1": (0.040366, 0.127452, 0.011036, -0.101212), "b1": (-0.091335, 0.113872, -0.038600, -0.032337),
        "w2": (0.026046, -0.027459, -0.056909, -0.093626), "b2": (-1.273344, 1.226257, 1.406020, -1.238934),
    },
}  # fmt: skip


def near(got, want, digits=6):
    # 2e-7: what float32 rotation angles and the eight-digit GELU constants of the published code may move.
    error = (got.double() - torch.tensor(want, dtype=F64)).abs().max().item()
    assert error <= 0.5 * 10**-digits + 2e-7, f"{got.tolist()} is not {want}: off by {error:.2e}"


@pytest.mark.parametrize("kind", ONE_HEAD)
@pytest.mark.parametrize("backend", ["naive", "chunked"])
@pytest.mark.parametrize("cut", [8, 4, 3])
def test_one_head_reads_and_ends_as_the_published_code(kind, backend, cut):
    args, state, outputs = one_head(), new_state(weights(kind)), []
    for at in (slice(0, cut), slice(cut, 8)):
        tokens = [x[:, at] for x in args[:4]]
        if tokens[0].numel():
            op = ttt_linear if kind == "linear" else ttt_mlp
            y, state = op(*tokens, *args[4:], state, chunk_size=4, backend=backend)
            outputs.append(y[0, :, 0])
    golden, o = ONE_HEAD[kind], torch.cat(outputs)
    for token, row in golden["o"].items():
        near(o[token], row)
    for name in golden.keys() - {"o"}:
        near(getattr(state.weights, name)[0, 0, 0, :4], golden[name])


def test_inner_gradients_are_the_published_ones():
    _, k, v, _, _, weight, bias = one_head()
    w = weights("linear")
    k, v = k[0, :4, 0], v[0, :4, 0]
    g = inner_gradient(k @ w.w1[0, 0] + w.b1[0, 0], v - k, weight, bias, 1e-6)
    near(g[0], (-65.859184, 14.801620, 56.000356, -4.942792))
    near(g[3], (3.902595, -2.566722, 15.826525, -17.162398))


# Whole models: vocabulary 50, width 16, feed-forward 24, 2 layers, 2 heads, 48 tokens. (layer type, Mamba backbone) →
# number of tensors, loss, and the first four logits at tokens 0, 15, 16 (the first that reads an update), 47.
MODELS = {
    ("linear", True): (52, 4.652030, (0.52815, -0.53329, -1.80380, 0.80298), (0.01564, -1.21101, -0.85812, -0.33886),
                       (0.74873, 0.29792, -2.29138, 0.95520), (-0.04378, -1.17469, 1.05209, -0.45826)),
    ("linear", False): (38, 4.925927, (-0.03235, -0.38150, -0.42778, 1.13411), (-0.46892, 1.01450, -1.66377, -0.28929),
                        (-0.05495, 0.76159, 0.77926, 1.00911), (-0.08872, 1.45113, 1.61864, 1.04793)),
    ("mlp", True): (56, 4.732173, (0.06380, 0.85377, -1.04813, 0.83165), (0.98449, -0.12182, -0.75209, -0.66955),
                    (-0.24543, 1.03212, -1.04766, 0.35573), (-1.42157, 0.62928, 1.03951, -0.33786)),
    ("mlp", False): (42, 4.726710, (-0.80134, 2.89974, -0.43860, 0.64051), (-0.01100, 1.31350, -0.27632, 1.01267),
                     (-0.91212, 2.47198, -0.30371, -0.63412), (0.33044, -0.18699, -0.81460, 1.38147)),
}  # fmt: skip
every_model = pytest.mark.parametrize("which", MODELS, ids=lambda w: f"{w[0]}-{'mamba' if w[1] else 'transformer'}")


def hashed(shapes):
    """s = frac(sin(12.9898 (k+1) + 78.233 (t+1)) · 43758.5453) − ½ at index k of tensor t; norm weights 1 + s/5."""
    filled = {}
    for t, name in enumerate(sorted(shapes)):
        k = torch.arange(math.prod(shapes[name]), dtype=F64)
        z = torch.sin(12.9898 * (k + 1) + 78.233 * (t + 1)) * 43758.5453
        s = z - z.floor() - 0.5
        s = 1 + 0.2 * s if name.endswith(("norm.weight", "norm_weight")) else s
        filled[name] = s.float().double().view(shapes[name])
    return filled


@pytest.fixture
def model(which, tmp_path):
    return imported(which, tmp_path)


def imported(which, tmp_path):
    """The golden model, through the importer of the PyTorch code's folders."""
    kind, mamba = which
    tensors = hashed(published_shapes(kind, mamba))
    assert len(tensors) == MODELS[which][0]
    source = tmp_path / "source"
    source.mkdir()
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(published_config(kind, mamba)))
    return import_checkpoint(source, tmp_path / "model", "ttt-lm")


TOKENS = ((7 * torch.arange(48) + 3) % VOCAB)[None]


def check(which, logits):
    _, loss, *rows = MODELS[which]
    for token, row in zip((0, 15, 16, 47), rows, strict=True):
        near(logits[0, token, :4], row, digits=5)
    got = torch.nn.functional.cross_entropy(logits[0, :-1], TOKENS[0, 1:])
    near(got, loss)


@every_model
@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_a_whole_model_has_the_published_logits_and_loss(which, model, backend):
    with torch.no_grad():
        logits, _ = model.set_backend(backend)(TOKENS)
    check(which, logits)


@every_model
def test_a_whole_model_has_them_token_by_token(which, model):
    state, rows = model.init_state(1), []
    with torch.no_grad():
        for t in range(48):
            row, state = model(TOKENS[:, t : t + 1], state)
            rows.append(row)
    check(which, torch.cat(rows, 1))


@every_model
@pytest.mark.parametrize("prompt", [1, 5, 16, 17, 40])
def test_a_whole_model_has_them_after_its_state_was_saved_and_loaded(which, model, prompt, tmp_path):
    with torch.no_grad():
        first, state = model(TOKENS[:, :prompt])
        state.save(tmp_path / "state.safetensors")
        second, _ = model(TOKENS[:, prompt:], load_state(tmp_path / "state.safetensors"))
    check(which, torch.cat([first, second], 1))


@every_model
def test_changing_a_token_leaves_the_logits_before_it_bit_identical(which, model):
    with torch.no_grad():
        for t in (3, 15, 16, 33):
            other = TOKENS.clone()
            other[0, t] = (other[0, t] + 1) % VOCAB
            assert torch.equal(model(other)[0][:, :t], model(TOKENS)[0][:, :t])
