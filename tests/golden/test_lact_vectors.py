"""Golden vectors of LaCT, computed once with the published code's formulas and printed with their tolerances.

Every input is F(shape; a, c) = sin(a·i² + c), i the row-major index from 1, in double, stored as float32.
"""

import math

import pytest
import torch

from fastweight.mixers.lact import Lact, LactConfig
from fastweight.ops.lact import LactWeights, init_lact, lact
from fastweight.ops.lact.newton_schulz import newton_schulz
from fastweight.state import ModelState, load_state

L, C, D = 14, 6, 4
BACKENDS = ("naive", "chunked")


def wave(*shape: int, a: float, c: float) -> torch.Tensor:
    i = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)
    return torch.sin(a * i * i + c).float().view(shape)


def operator_inputs(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """One head, D = F = 4, 14 tokens."""
    named = {f"w{j}": wave(D, D, a=a, c=c) for j, (a, c) in enumerate(((0.37, 0.1), (0.53, 0.2), (0.71, 0.3)))}
    named |= {x: wave(L, D, a=a, c=c) for x, a, c in (("q", 0.29, 0.4), ("k", 0.43, 0.5), ("v", 0.61, 0.6))}
    named |= {f"e{j}": 0.05 * (1 + wave(L, a=0.9, c=float(j))) for j in range(3)}
    named["b"] = 0.5 + 0.3 * wave(L, a=1.1, c=0.0)
    return {name: t.to(dtype) for name, t in named.items()}


def run(x: dict, cuts=(), *, momentum: bool, backend="auto", prenorm=False, **settings) -> torch.Tensor:
    """Outputs [L, D], read in pieces that end at `cuts`."""
    weights = LactWeights(x["w0"][None], x["w1"][None], x["w2"][None])
    state = init_lact(*weights, 1, chunk_size=C, momentum=momentum, prenorm=prenorm)
    q, k, v = (x[name][None, :, None] for name in "qkv")
    lr = torch.stack([x["e0"], x["e1"], x["e2"]], -1)[None, :, None]
    b = x["b"][None, :, None] if momentum else None
    outputs = []
    for start, stop in zip((0, *cuts), (*cuts, L)):
        at = slice(start, stop)
        y, state = lact(
            q[:, at], k[:, at], v[:, at], lr[:, at], None if b is None else b[:, at], state,
            chunk_size=C, prenorm=prenorm, backend=backend, **settings,
        )  # fmt: skip
        outputs.append(y[0, :, 0])
    return torch.cat(outputs)


FIRST = (0.129147, 0.531668, -1.948422, 2.309743)
SIXTH = (0.633776, -0.896190, 0.121251, -1.258699)
MUON_SIXTH = (3.150787, 0.151309, -0.230428, -3.522043)
# settings: (output at token 6, output at token 13, sum of absolute outputs); token 0 reads the initial weights in all.
PLAIN = {
    "gradient descent": ({"momentum": False}, SIXTH, (0.818702, -0.350682, -0.624547, -0.033694), 37.040829),
    "momentum": ({"momentum": True}, SIXTH, (0.789523, -0.343000, -0.621240, -0.021319), 37.268829),
    "pre-norm": ({"momentum": True, "prenorm": True}, SIXTH, (0.788096, -0.346700, -0.607325, -0.025940), 37.231953),
}
MUON = {
    "post-norm": (
        {"momentum": True, "muon": "separate"}, MUON_SIXTH, (-0.290590, -0.323859, -0.062601, 0.261351), 42.586426,
    ),
    "pre-norm": (
        {"momentum": True, "prenorm": True, "muon": "separate"},
        MUON_SIXTH, (0.005407, -0.425071, -0.086956, -0.324493), 42.767494,
    ),
    "joint": (
        {"momentum": True, "muon": "joint"},
        (3.368426, 0.109566, -0.150233, -3.849774), (0.124137, -0.042263, 0.156613, -0.192296), 40.659637,
    ),
}  # fmt: skip


def check(y: torch.Tensor, sixth, last, total, tolerance: float) -> None:
    for t, row in ((0, FIRST), (6, sixth), (13, last)):
        assert (y[t].double() - torch.tensor(row, dtype=torch.float64)).abs().max() < tolerance, f"token {t}: {y[t]}"
    assert y.double().abs().sum().item() == pytest.approx(total, abs=tolerance * L)


@pytest.mark.parametrize("cuts", [(), (3, 7), tuple(range(1, L))], ids=["whole", "pieces", "tokens"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", PLAIN)
def test_outputs_are_the_printed_ones(case, backend, cuts):
    settings, *printed = PLAIN[case]
    check(run(operator_inputs(), cuts, backend=backend, **settings), *printed, tolerance=2e-5)


@pytest.mark.parametrize("cuts", [(), (3, 7), tuple(range(1, L))], ids=["whole", "pieces", "tokens"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", MUON)
def test_orthogonalised_outputs_are_the_printed_ones(case, backend, cuts):
    # Exact Newton-Schulz; six tokens of four channels make nearly singular directions, hence the wide tolerance.
    settings, *printed = MUON[case]
    check(run(operator_inputs(), cuts, backend=backend, **settings), *printed, tolerance=1e-3)


def test_bfloat16_newton_schulz_rounds_like_the_published_code():
    y = run(operator_inputs(), momentum=True, muon="separate", muon_dtype="bfloat16", backend="naive")
    # Processors add bfloat16 products in different orders; exact Newton-Schulz is 0.05 away.
    check(y, (3.101201, 0.152411, -0.220760, -3.467434), (-0.318858, -0.324393, -0.039318, 0.244459), 42.424809, 1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_of_absolute_gradients_are_the_printed_ones(backend):
    x = {name: t.requires_grad_() for name, t in operator_inputs().items()}
    loss = (run(x, momentum=True, backend=backend) * wave(L, D, a=0.17, c=0.7)).sum()
    printed = {
        "w0": 25.87514, "w1": 21.92319, "w2": 20.63746, "q": 66.82395, "k": 7.72459, "v": 7.68542,
        "e0": 16.78373, "e1": 25.72181, "e2": 5.49286, "b": 0.11133,
    }  # fmt: skip
    gradients = dict(zip(x, torch.autograd.grad(loss, list(x.values()))))
    sums = {name: gradients[name].double().abs().sum().item() for name in printed}
    assert sums == pytest.approx(printed, rel=1e-4)


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((4, 4), {0: (0.532166, 0.055782, -0.709105, 0.467136), 3: (0.178443, -0.078066, 0.612715, 0.767886)}),
        ((4, 3), {0: (0.539052, 0.584171, -0.476706), 3: (0.586991, -0.410354, 0.481965)}),
    ],
    ids=["square", "tall"],
)
def test_newton_schulz_gives_the_printed_rows(shape, rows):
    (got,) = newton_schulz([wave(*shape, a=0.45, c=0.25)])
    for row, values in rows.items():
        assert (got[row] - torch.tensor(values)).abs().max() < 1e-4


def test_bfloat16_newton_schulz_gives_the_printed_row():
    (got,) = newton_schulz([wave(4, 4, a=0.45, c=0.25)], "bfloat16")
    assert (
        got[0] - torch.tensor((0.539062, 0.059570, -0.703125, 0.468750))
    ).abs().max() < 4e-3  # half its distance from the exact row


PUBLISHED = {  # the published layer's parameter names, sorted, and ours
    "lr_proj.bias": "rate.bias",
    "lr_proj.weight": "rate.weight",
    "momentum_proj.0.bias": "momentum.bias",
    "momentum_proj.0.weight": "momentum.weight",
    "o_proj.weight": "out.weight",
    "qk_offset": "qk_offset",
    "qk_scale": "qk_scale",
    "qkv.weight": "qkv.weight",
    "ttt_norm.weight": "out_norm.weight",
    "ttt_scale_proj.bias": "gate.bias",
    "ttt_scale_proj.weight": "gate.weight",
    "w0.w_left": "w0.left",
    "w0.w_right": "w0.right",
    "w1": "w1",
    "w2.w_left": "w2.left",
    "w2.w_right": "w2.right",
}


def layer() -> Lact:
    config = LactConfig(num_heads=2, num_fast_heads=2, chunk_size=4, window=4, low_rank=2)
    mixer = Lact(16, config)
    with torch.no_grad():
        for p, (published, name) in enumerate(PUBLISHED.items()):
            parameter = mixer.get_parameter(name)
            parameter.copy_(0.3 * wave(*parameter.shape, a=0.37 + 0.01 * p, c=0.05 * p))
            if published in ("qk_scale", "ttt_norm.weight"):
                parameter.add_(1)
    return mixer


def check_layer(y: torch.Tensor) -> None:
    printed = {
        0: (0.102122, 0.146216, -1.251869, 0.950933),
        5: (1.038458, -0.055990, -1.232942, -0.479302),
        9: (-0.214620, 0.224397, 0.520265, 0.021916),
    }
    for t, row in printed.items():
        assert (y[0, t, :4] - torch.tensor(row)).abs().max() < 1e-4, f"token {t}"
    assert y.abs().sum().item() == pytest.approx(60.944466, abs=1e-4 * y.numel())


LAYER_INPUT = wave(1, 10, 16, a=0.31, c=0.2)


@pytest.mark.parametrize("cuts", [(), (3, 8), tuple(range(1, 10))], ids=["whole", "pieces", "tokens"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_layer_gives_the_printed_outputs(backend, cuts):
    mixer = layer()
    mixer.backend = backend
    state, outputs = mixer.init_state(1), []
    for start, stop in zip((0, *cuts), (*cuts, 10)):
        y, state = mixer(LAYER_INPUT[:, start:stop], state)
        outputs.append(y)
    check_layer(torch.cat(outputs, 1))


@pytest.mark.parametrize("cut", [4, 6])
def test_the_layer_gives_the_printed_outputs_after_its_state_was_saved_and_loaded(cut, tmp_path):
    mixer = layer()
    first, state = mixer(LAYER_INPUT[:, :cut], mixer.init_state(1))
    ModelState((state,), torch.tensor([cut]), "layer").save(tmp_path / "state")
    second, _ = layer()(LAYER_INPUT[:, cut:], load_state(tmp_path / "state").visits[0])
    check_layer(torch.cat([first, second], 1))
