"""bfloat16 weights and autocast: finite, close to float64, with a memory in float32."""

import contextlib

import pytest
import torch
from hf.faces import KINDS, face_of, ids_of
from tolerances import relative_error

from fastweight.state import tensors

every_kind = pytest.mark.parametrize("kind", KINDS)
each_way = pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
MEMORIES = [kind for kind in KINDS if kind not in ("attention", "window")]


def casting(on):
    return torch.autocast("cpu", dtype=torch.bfloat16) if on else contextlib.nullcontext()


def loud(kind, dtype):
    """The face with mixer inputs ten times as large."""
    face = face_of(kind, dtype)
    with torch.no_grad():
        for block in face.model.blocks:
            block.mixer_norm.weight.mul_(10)
    return face


@every_kind
@each_dtype
@each_way
def test_p15_tenfold_activations_stay_finite_forward_backward_and_in_decoding(kind, dtype, autocast):
    face, ids = loud(kind, dtype), ids_of(2, 19)
    with casting(autocast):
        out = face.train()(ids, labels=ids)
    out.loss.backward()
    assert out.logits.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in face.parameters())
    with casting(autocast):
        scores = face.eval().generate(
            ids, max_new_tokens=4, do_sample=False, output_scores=True, return_dict_in_generate=True
        )
    assert torch.stack(scores.scores).isfinite().all()


@every_kind
@each_way
def test_p15_bfloat16_weights_give_the_logits_of_float64_up_to_their_rounding(kind, autocast):
    face, ids = face_of(kind, torch.bfloat16), ids_of(2, 19)
    exact = face_of(kind, torch.float64)
    exact.load_state_dict(face.state_dict())
    with casting(autocast), torch.no_grad():
        got = face(ids).logits
    # Eight bits, amplified by weights of std 0.3 in up to four visits; an independent model would be at 1.4.
    assert relative_error(got, exact(ids).logits) < 0.25


@pytest.mark.parametrize("kind", MEMORIES)
@each_dtype
@each_way
def test_p15_the_memory_is_kept_in_float32(kind, dtype, autocast):
    face = face_of(kind, dtype)
    with casting(autocast), torch.no_grad():
        state = face(ids_of(2, 19), use_cache=True).past_key_values.state
    parts = [part for visit in state.visits for part in tensors(visit)]
    held = [tensor for name, tensor in parts if "memory" in name.split(".") and tensor.is_floating_point()]
    assert {tensor.dtype for tensor in held} == {torch.float32}


@each_way
def test_p15_loss_and_gradients_of_float32_weights_are_float32(autocast):
    face, ids = face_of("hybrid").train(), ids_of(2, 19)
    with casting(autocast):
        loss = face(ids, labels=ids).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert {p.grad.dtype for p in face.parameters() if p.grad is not None} == {torch.float32}
