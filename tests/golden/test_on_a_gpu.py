"""The golden vectors by every backend that a GPU runs, in float32, which widens their tolerances."""

import pytest
import torch
from golden import test_lact_vectors as lact_vectors
from golden import test_ttt_vectors as ttt_vectors

from fastweight.ops import dispatch
from fastweight.ops.ttt import new_state, ttt_linear, ttt_mlp
from fastweight.state import map_tensors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ROUNDING = 1e-4  # inner gradients of these vectors reach 66: float32 leaves five digits


def moved(x):
    return x.to("cuda", torch.float32 if x.is_floating_point() else x.dtype)


@pytest.mark.parametrize("kind", ttt_vectors.ONE_HEAD)
@pytest.mark.parametrize("cut", [8, 4, 3])
def test_one_head_of_ttt(kind, cut):
    op, args = (ttt_linear if kind == "linear" else ttt_mlp), [moved(x) for x in ttt_vectors.one_head()]
    names = dispatch.runnable(f"ttt_{kind}", args[0])
    assert "triton" in names
    for backend in names:
        state, outputs = map_tensors(moved, new_state(ttt_vectors.weights(kind))), []
        for at in (slice(0, cut), slice(cut, 8)):
            tokens = [x[:, at] for x in args[:4]]
            if tokens[0].numel():
                y, state = op(*tokens, *args[4:], state, chunk_size=4, backend=backend)
                outputs.append(y[0, :, 0])
        golden = ttt_vectors.ONE_HEAD[kind]
        for token, row in golden["o"].items():
            off = (torch.cat(outputs)[token].cpu() - torch.tensor(row)).abs().max().item()
            assert off < ROUNDING, f"{backend}, token {token}: off by {off:.1e}"
        off = (state.weights.w1[0, 0, 0, :4].cpu() - torch.tensor(golden["w1"])).abs().max().item()
        assert off < ROUNDING, f"{backend}, w1: off by {off:.1e}"


@pytest.mark.parametrize("case", lact_vectors.PLAIN)
@pytest.mark.parametrize("cuts", [(), (3, 7)])
def test_the_operator_of_lact(case, cuts):
    inputs = {name: moved(x) for name, x in lact_vectors.operator_inputs().items()}
    settings, *printed = lact_vectors.PLAIN[case]
    for backend in dispatch.runnable("lact", inputs["q"][None, :, None]):
        y = lact_vectors.run(inputs, cuts, backend=backend, **settings)
        lact_vectors.check(y.cpu(), *printed, tolerance=ROUNDING)


@pytest.mark.parametrize("which", ttt_vectors.MODELS, ids=lambda w: f"{w[0]}-{'mamba' if w[1] else 'transformer'}")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 3e-2)])
def test_an_imported_checkpoint_of_ttt_has_the_published_loss(which, dtype, tolerance, tmp_path):
    model = ttt_vectors.imported(which, tmp_path).to("cuda", dtype)
    tokens = ttt_vectors.TOKENS.cuda()
    for backend in ("triton", "chunked"):
        with torch.no_grad():
            logits, _ = model.set_backend(backend)(tokens)
        loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), tokens[0, 1:])
        assert loss.item() == pytest.approx(ttt_vectors.MODELS[which][1], abs=tolerance), backend
