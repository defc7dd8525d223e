"""Starting a Triton kernel again costs the host little.

Triton looks at every argument of every launch for the compiled kernel that fits, and asks the driver about every
pointer. For forty arguments that takes the host longer than most kernels take the device. What decides is the same from
call to call, so the compiled kernel is kept by it, and is started with addresses: the driver is asked nothing.
"""

import ctypes
import functools
import operator
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

ALIGNED = 16  # bytes: kernels are compiled for addresses that are multiples of it, as torch's allocator gives them
WIDE = 2**31  # from here on an integer is an argument of another type
_PREFERRED_CARVEOUT = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT of cuda.h


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
        if found.n_spills and torch.version.cuda is not None:
            leave_to_cache(found, tensors[0].get_device())
        names = kernel.arg_names[len(tensors) + len(numbers) :]
        _ready[key] = _Ready(found.__getitem__, tuple([constants[name] for name in names]))


def leave_to_cache(kernel: Any, device: int) -> None:
    """Give the L1 cache what the shared memory of a compiled kernel's blocks leaves of their multiprocessor's.

    Triton asks for all of it as shared memory wherever a block wants more than 48 KiB. What threads keep in local
    memory then goes to L2, which takes some 250 cycles in place of 30.
    """
    about = torch.cuda.get_device_properties(device)
    share = shared_share(
        kernel.n_regs, 32 * kernel.metadata.num_warps, kernel.metadata.shared, about.regs_per_multiprocessor,
        about.shared_memory_per_multiprocessor,
    )  # fmt: skip
    failed = _driver().cuFuncSetAttribute(ctypes.c_void_p(kernel.function), _PREFERRED_CARVEOUT, share)
    if failed:  # the kernel runs as it did, a little slower
        warnings.warn(
            f"the CUDA driver took no carveout of {share} % for {kernel.name}: error {failed}.",
            RuntimeWarning,
            stacklevel=3,
        )


def shared_share(registers: int, threads: int, shared: int, all_registers: int, all_shared: int) -> int:
    """Percent of a multiprocessor's memory that as many blocks use as its registers and that memory let run at once.

    registers: of a thread; shared: bytes of a block, of which the system takes another KiB.
    """
    of_block, taken = (registers + 7) // 8 * 8 * threads, shared + 1024
    blocks = max(1, min(all_registers // of_block, all_shared // taken))
    return min(100, -(-100 * blocks * taken // all_shared))


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
