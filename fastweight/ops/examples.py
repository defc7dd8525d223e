"""Inputs for each op as its layers give them, of any size: what errors are measured on, and times."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastweight.ops.attention import AttentionState, attention
from fastweight.ops.delta import DeltaState, delta_rule
from fastweight.ops.in_place import in_place, init_in_place
from fastweight.ops.lact import init_lact, lact
from fastweight.ops.ttt import TTTWeights, new_state, ttt_linear, ttt_mlp
from fastweight.state import Faults

Inputs = dict[str, Tensor]


class Shape(NamedTuple):
    """B sequences of T tokens, H heads of D channels."""

    batch: int
    length: int
    heads: int
    dim: int

    def __str__(self) -> str:
        return f"B{self.batch} T{self.length} H{self.heads} D{self.dim}"


class Example(NamedTuple):
    """One use of an op.

    draw(shape, device): (tokens, others), float32; the op reads tokens in the dtype of the layer, others in float32.
    run(inputs, backend): y; inputs are both together, every one of them may ask for a gradient.
    """

    op: str
    draw: Callable[[Shape, str], tuple[Inputs, Inputs]]
    run: Callable[[Inputs, str], Tensor]


def examples(*, window: int, mini_batch: int, chunk: int, muon_dtype: str = "float32") -> dict[str, Example]:
    """Name → example; window: tokens of the windowed attention; mini_batch: of TTT; chunk: of LaCT and In-Place.

    muon_dtype: of LaCT's inner Muon; "bfloat16" is the published arithmetic.
    """
    made = {
        "attention, full": Example("attention", _attention_inputs, _run_attention(None)),
        f"attention, window {window}": Example("attention", _attention_inputs, _run_attention(window)),
        "delta rule": Example("delta_rule", _delta_inputs(False), _run_delta),
        "gated delta rule": Example("delta_rule", _delta_inputs(True), _run_delta),
        f"TTT-Linear, mini-batch {mini_batch}": Example("ttt_linear", _ttt_inputs(1), _run_ttt(ttt_linear, mini_batch)),
        f"TTT-MLP, mini-batch {mini_batch}": Example("ttt_mlp", _ttt_inputs(4), _run_ttt(ttt_mlp, mini_batch)),
        f"In-Place, chunk {chunk}": Example("in_place", _in_place_inputs, _run_in_place(chunk)),
    }
    for name, muon, update in (
        ("momentum", "none", "all"),
        ("momentum + Muon", "separate", "all"),
        ("only w1 learns", "none", "w1"),
    ):
        made[f"LaCT, {name}, chunk {chunk}"] = Example("lact", _lact_inputs, _run_lact(chunk, muon, muon_dtype, update))
    return made


def _normal(shape: Shape, device: str, *tail: int) -> Tensor:
    return torch.randn(shape.batch, shape.length, shape.heads, *tail, device=device)


def _uniform(shape: Shape, device: str, *tail: int) -> Tensor:
    return torch.rand(shape.batch, shape.length, shape.heads, *tail, device=device)


def _unit(shape: Shape, device: str) -> Tensor:
    return F.normalize(_normal(shape, device, shape.dim), dim=-1)


def _attention_inputs(s: Shape, device: str) -> tuple[Inputs, Inputs]:
    return {name: _normal(s, device, s.dim) for name in "qkv"}, {}


def _run_attention(window: int | None) -> Callable[[Inputs, str], Tensor]:
    def run(x: Inputs, backend: str) -> Tensor:
        n, _, heads, dim = x["q"].shape
        state = AttentionState.empty(n, heads, dim, dtype=x["q"].dtype, device=x["q"].device)
        return attention(x["q"], x["k"], x["v"], state, window=window, backend=backend)[0]

    return run


def _delta_inputs(gated: bool) -> Callable[[Shape, str], tuple[Inputs, Inputs]]:
    def draw(s: Shape, device: str) -> tuple[Inputs, Inputs]:
        others = {"beta": _uniform(s, device), "memory": torch.randn(s.batch, s.heads, s.dim, s.dim, device=device)}
        if gated:
            others["log_decay"] = -0.1 * _uniform(s, device)
        return {"q": _unit(s, device), "k": _unit(s, device), "v": _normal(s, device, s.dim)}, others

    return draw


def _run_delta(x: Inputs, backend: str) -> Tensor:
    n, device = len(x["memory"]), x["memory"].device
    state = DeltaState(x["memory"], torch.zeros(n, dtype=torch.int64, device=device), Faults.none(n, device))
    return delta_rule(x["q"], x["k"], x["v"], x["beta"], state, log_decay=x.get("log_decay"), backend=backend)[0]


@functools.cache
def _tau(mini_batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """1/(i + 1): the same in every call, so it is no part of what a call takes."""
    return 1 / torch.arange(1, mini_batch + 1, device=device, dtype=dtype)


def _ttt_inputs(expansion: int) -> Callable[[Shape, str], tuple[Inputs, Inputs]]:
    def draw(s: Shape, device: str) -> tuple[Inputs, Inputs]:
        width = expansion * s.dim

        def weight(*shape: int) -> Tensor:
            return 0.02 * torch.randn(s.batch, s.heads, *shape, device=device)

        others = {
            "rate": _uniform(s, device) / s.dim,
            "ln_weight": torch.rand(s.heads, s.dim, device=device) + 0.5,
            "ln_bias": 0.1 * torch.randn(s.heads, s.dim, device=device),
            "w1": weight(s.dim, width),
            "b1": weight(1, width),
        }
        if expansion > 1:
            others |= {"w2": weight(width, s.dim), "b2": weight(1, s.dim)}
        return {name: _normal(s, device, s.dim) for name in "qkv"}, others

    return draw


def _run_ttt(op: Callable, mini_batch: int) -> Callable[[Inputs, str], Tensor]:
    def run(x: Inputs, backend: str) -> Tensor:
        state = new_state(TTTWeights(x["w1"], x["b1"], x.get("w2"), x.get("b2")))
        tau = _tau(mini_batch, x["rate"].device, x["rate"].dtype)
        tokens = (x["q"], x["k"], x["v"], x["rate"])
        return op(*tokens, tau, x["ln_weight"], x["ln_bias"], state, chunk_size=mini_batch, backend=backend)[0]

    return run


def _in_place_inputs(s: Shape, device: str) -> tuple[Inputs, Inputs]:
    dim = s.heads * s.dim  # of the model; the hidden layer is four times as wide
    tokens = {
        "hidden": torch.randn(s.batch, s.length, 4 * dim, device=device),
        "target": torch.randn(s.batch, s.length, dim, device=device),
    }
    others = {
        "taps": torch.randn(dim, 5, device=device),
        "projection": torch.randn(dim, dim, device=device) * dim**-0.5,
    }
    return tokens, others | {"weight": torch.randn(dim, 4 * dim, device=device) * (4 * dim) ** -0.5}


def _run_in_place(chunk: int) -> Callable[[Inputs, str], Tensor]:
    def run(x: Inputs, backend: str) -> Tensor:
        state = init_in_place(x["weight"], len(x["hidden"]))
        given = (x["hidden"], x["target"], x["taps"], x["projection"], x["weight"])
        return in_place(*given, state, chunk_size=chunk, inner_lr=1e-4, max_norm=1.0, backend=backend)[0]

    return run


def _lact_inputs(s: Shape, device: str) -> tuple[Inputs, Inputs]:
    others = {name: torch.randn(s.heads, s.dim, s.dim, device=device) * s.dim**-0.5 for name in ("w0", "w1", "w2")}
    others |= {"lr": 1e-3 * _uniform(s, device, 3), "momentum": _uniform(s, device)}
    return {"q": _unit(s, device), "k": _unit(s, device), "v": _normal(s, device, s.dim)}, others


def _run_lact(chunk: int, muon: str, muon_dtype: str, update: str) -> Callable[[Inputs, str], Tensor]:
    def run(x: Inputs, backend: str) -> Tensor:
        weights = (x["w0"], x["w1"], x["w2"], len(x["q"]))
        state = init_lact(*weights, chunk_size=chunk, momentum=True, update=update, token_dtype=x["q"].dtype)
        given = (x["q"], x["k"], x["v"], x["lr"], x["momentum"], state)
        return lact(
            *given, chunk_size=chunk, muon=muon, muon_dtype=muon_dtype, update=update, backend=backend
        )[0]  # fmt: skip

    return run
