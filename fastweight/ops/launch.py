"""Starting a Triton kernel again costs the host little.

Triton looks at every argument of every launch for the compiled kernel that fits, and asks the driver about every
pointer. For forty arguments that takes the host longer than most kernels take the device. What decides is the same from
call to call, so the compiled kernel is kept by it, and is started with addresses: the driver is asked nothing.
"""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

ALIGNED = 16  # bytes: kernels are compiled for addresses that are multiples of it, as torch's allocator gives them
WIDE = 2**31  # from here on an integer is an argument of another type


class _Ready(NamedTuple):
    """start(grid) takes all arguments; rest: the values of those that follow tensors and numbers."""

    start: Callable[[tuple[int, int, int]], Callable[..., None]]
    rest: tuple


_ready: dict[tuple, _Ready] = {}


def block(size: int) -> int:
    """The tile that holds `size` entries: a power of two, and at least what matrix units take."""
    return max(16, 1 << (size - 1).bit_length())


def launch(
    kernel: Any, grid: Sequence[int], tensors: Sequence[Tensor], numbers: Sequence[float],
    constants: Mapping[str, Any], options: Mapping[str, Any],
) -> None:  # fmt: skip
    """Start `kernel` with tensors, then numbers; constants: all its other parameters by name; options: num_warps ….

    All tensors must be on the current device: the caller has checked it, nobody looks again.
    """
    addresses = [t.data_ptr() for t in tensors]
    if functools.reduce(operator.or_, addresses) % ALIGNED or max(numbers) >= WIDE:
        kernel[grid](*tensors, *numbers, **constants, **options)
        return
    # Of numbers Triton may ask whether they are 1, and multiples of 16.
    kinds = tuple([(type(n), n == 1, n % 16 == 0) for n in numbers])
    dtypes = tuple([t.dtype for t in tensors])
    key = (kernel.fn, tensors[0].get_device(), dtypes, kinds, *constants.values(), *options.values())
    ready = _ready.get(key)
    if ready is not None:
        ready.start((*grid, 1, 1)[:3])(*addresses, *numbers, *ready.rest)  # type: ignore[arg-type]  # three
        return
    found = kernel[grid](*tensors, *numbers, **constants, **options)
    if found is not None:  # the interpreter compiles nothing
        names = kernel.arg_names[len(tensors) + len(numbers) :]
        _ready[key] = _Ready(found.__getitem__, tuple([constants[name] for name in names]))
