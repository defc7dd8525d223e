"""How the projections of new blocks are drawn where a config asks for more than normal numbers."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


@torch.no_grad()
def draw_projections(blocks: Iterable[Any], in_init: str, out_init: str) -> None:
    """Draw the matrices at both ends of every mixer and feed-forward anew.

    in_init "orthogonal": those that read a layer's input get orthonormal rows or columns (Saxe et al. 2014,
    arXiv:1312.6120). out_init "zero": those that write its output are 0, so that a new block adds nothing to the
    residual stream. "normal" leaves them as they are.
    """
    for block in blocks:
        for layer in (block.mixer, block.feed_forward):
            if layer is None or (in_init, out_init) == ("normal", "normal"):
                continue
            read, write = layer.projections()
            for matrix in read if in_init == "orthogonal" else []:
                nn.init.orthogonal_(matrix)
            if out_init == "zero":
                nn.init.zeros_(write)
