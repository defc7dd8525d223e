"""Compiled blocks: room for all their graphs, and compilation before the training clock runs."""

import contextlib
from collections.abc import Iterator

import torch

from fastweight.data import Batch
from fastweight.distributed.shards import is_sharded
from fastweight.model import Model
from fastweight.train.objectives import Objective

# How many graphs one function may have; blocks of one shape share theirs. Beyond torch's own limit of 8 (training,
# measuring, other lengths, other kinds of blocks) it would go on uncompiled and say so in a warning alone.
MOST_GRAPHS = 128
# The first pass makes what layers keep (rates of rotations), the second one is then compiled like all later ones.
PASSES = 2


@contextlib.contextmanager
def compiled_blocks(model: Model) -> Iterator[None]:
    """Inside, each block is compiled when it is first called; of a cut one what it computes, without the putting
    together of its weights."""
    for block in model.blocks:
        if is_sharded(block):
            block.forward = torch.compile(block.forward)
        else:
            block.compile()
    with tracing():
        yield


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """Inside, compiled blocks have room for all their graphs, and their derivatives have the precision of what they are
    derivatives of: torch's own setting would round to bfloat16 in them what autocast was kept away from."""
    import torch._dynamo
    import torch._functorch.config

    room = torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS)
    with room, torch._functorch.config.patch(backward_pass_autocast="off"):
        yield


def compile_for(objective: Objective, batch: Batch) -> None:
    """Compile what a step on a micro-batch like `batch` calls. Its gradients are left behind; random numbers are not
    used up."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        totals = [total or 1.0 for total in objective.totals([batch])]
        for _ in range(PASSES):
            objective.learn(batch, None, max(1, batch.num_targets), totals)
