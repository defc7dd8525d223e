"""What the host knows of positions that live on a device, so that it need not wait for the device to ask.

`remember` notes on a tensor of positions what it holds; the note is lost with the tensor, and void when somebody
writes to it. A tensor made under torch.inference_mode does not tell of writes: whoever overwrites one in place (a
captured graph's buffers) must pass a copy on, which bears no note.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_NOTE = "_fastweight_positions"


def remember(position: Tensor, values: Sequence[int]) -> None:
    """Note that `position` [N] holds `values`."""
    if position.is_cuda and not torch.compiler.is_compiling():
        setattr(position, _NOTE, (_version(position), tuple(values)))


def known(position: Tensor, *, look: bool) -> list[int] | None:
    """The values of `position`, or None if only the device knows them. look: ask it if need be, which waits for it."""
    if torch.compiler.is_compiling() and not look:
        return None  # a compiled graph holds for all positions
    if not position.is_cuda:
        return position.tolist()
    version, values = getattr(position, _NOTE, (None, None))
    if values is not None and version == _version(position):
        return list(values)
    if not look:
        return None
    values = position.tolist()
    remember(position, values)
    return values


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version
