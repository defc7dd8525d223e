"""How well the fast network fits each chunk, before and after it learned from it."""

import torch
from torch import Tensor

from fastweight.ops.lact import LactPending, LactState, LactWeights, Rule
from fastweight.ops.lact.layout import lay_out, tokens_on_grid
from fastweight.ops.lact.update import learn, network
from fastweight.state import map_tensors, zip_tensors


@torch.no_grad()
def chunk_losses(tokens: LactPending, state: LactState, rule: Rule) -> dict[str, Tensor]:
    """The inner loss −⟨f(k), v⟩, mean over sequences, heads and tokens, of each chunk that the tokens complete.

    tokens: [B, T, ...], read from `state` on; a chunk that had begun before counts whole. Series of one value per
    chunk number: "initial" under the weights of `state`, "before" and "after" the chunk's own update.
    """
    tokens = zip_tensors(lambda t, kept: t.to(kept.dtype), tokens, state.pending)
    batch, length = tokens.k.shape[:2]
    layout = lay_out(state.position, [length] * batch, state.position.tolist(), rule.chunk_size)
    plan, grid = layout.plan, tokens_on_grid(tokens, state.pending, layout)
    memory = map_tensors(lambda t: t.index_select(0, plan.order), state.memory)
    first = memory.weights
    series = {"initial": [], "before": [], "after": []}
    for rows, complete, chunk in zip(plan.active, plan.complete, _split_chunks(grid, plan.active), strict=True):
        done = torch.arange(rows, device=plan.order.device)
        done = done if complete is None else done[complete]
        if not done.numel():
            break
        # Rows that go on to another chunk are complete and come first, so selecting keeps them in their places.
        first, memory, chunk = map_tensors(lambda t, done=done: t.index_select(0, done), (first, memory, chunk))
        series["initial"].append(_loss(first, chunk))
        series["before"].append(_loss(memory.weights, chunk))
        memory = learn(memory, chunk, rule)[0] if rule.learn else memory
        series["after"].append(_loss(memory.weights, chunk))
    return {name: torch.stack(v) if v else tokens.lr.new_zeros(0) for name, v in series.items()}


def _split_chunks(grid: LactPending, active: list[int]) -> list[LactPending]:
    """The tokens of each chunk number, [active, C, ...]."""
    parts = [[None] * len(active) if t is None else t.split(active) for t in grid]
    return [LactPending(*part) for part in zip(*parts, strict=True)]


def _loss(w: LactWeights, chunk: LactPending) -> Tensor:
    k, v = (t.to(w.w1.dtype).transpose(1, 2) for t in (chunk.k, chunk.v))
    return -(network(w, k) * v).sum(-1).mean()
