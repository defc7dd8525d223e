"""Other people's code for the same work, where it is installed: timed beside ours in one run, never imported by us.

A peer is (name, run(inputs) → y). It computes the same function unless its name says otherwise.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from fastweight.ops.examples import Inputs

Run = Callable[[Inputs], Tensor]


def peers(name: str, device: str, *, window: int, mini_batch: int) -> Iterator[tuple[str, Run]]:
    """The peers of the example called `name` that can run on `device`."""
    cuda = device.startswith("cuda")
    if name == "attention, full":
        yield "PyTorch SDPA", _sdpa
    if name.startswith("attention, window") and cuda:
        yield "PyTorch FlexAttention, compiled", _flex(window)
    if cuda and importlib.util.find_spec("fla"):
        yield from _fla(name, mini_batch)


def _heads_first(x: Inputs) -> list[Tensor]:
    return [x[name].transpose(1, 2) for name in "qkv"]


def _sdpa(x: Inputs) -> Tensor:
    q, k, v = _heads_first(x)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _flex(window: int) -> Run:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention)

    @cache
    def mask(length: int, device: torch.device):
        def visible(b, h, query, key):  # the framework calls it with index tensors
            return (key <= query) & (key > query - window)

        return create_block_mask(visible, None, None, length, length, device=str(device))

    def run(x: Inputs) -> Tensor:
        block_mask = mask(x["q"].shape[1], x["q"].device)
        # Asked for no more than y, it returns a tensor and no tuple.
        return compiled(*_heads_first(x), block_mask=block_mask).transpose(1, 2)  # type: ignore[union-attr]  # a tensor

    return run


def _fla(name: str, mini_batch: int) -> Iterator[tuple[str, Run]]:
    if name == "delta rule":
        chunk_delta_rule = importlib.import_module("fla.ops.delta_rule").chunk_delta_rule
        yield "fla chunk_delta_rule", lambda x: chunk_delta_rule(x["q"], x["k"], x["v"], x["beta"], scale=1.0)[0]
    if name == "gated delta rule":
        chunk_gated_delta_rule = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule

        def gated(x: Inputs) -> Tensor:
            return chunk_gated_delta_rule(x["q"], x["k"], x["v"], x["log_decay"], x["beta"], scale=1.0)[0]

        yield "fla chunk_gated_delta_rule", gated
    if name.startswith("TTT-Linear"):
        chunk_ttt_linear = importlib.import_module("fla.ops.ttt").chunk_ttt_linear

        def ttt(x: Inputs) -> Tensor:
            weight, bias = (x[n].to(x["q"].dtype) for n in ("ln_weight", "ln_bias"))
            eta = x["rate"][..., None].to(x["q"].dtype)
            return chunk_ttt_linear(x["q"], x["k"], x["v"], weight, bias, eta, chunk_size=mini_batch)[0]

        yield "fla chunk_ttt_linear (another, simpler function)", ttt
