"""How the kernels of both memories are cut up and launched: tile sizes, kept states, and stretches to replay."""

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastweight.ops.launch import block, launch

KEEP_EVERY = 16  # mini-batches between two kept states
READ_AT_ONCE = 8  # mini-batches that one program reads in a row where TTT-MLP's memory is held
REPLAY_BYTES = 1 << 31  # most that the replayed states of one part of the backward pass may take
MAX_DIM, MAX_CHUNK = 128, 64
HIDDEN_BLOCK = 64  # hidden units of a memory in registers at once
# Where TTT-MLP's memory is between mini-batches, by pass: in registers if it fits ("held"), or "streamed" through L2.
MLP_DESIGN = {"forward": "held", "backward": "held"}
HELD_DIM, HELD_WIDTH, HELD_CHUNK = 64, 256, 16  # the largest memory and mini-batch of the kernels that hold it,
HELD_SHARED = 227 << 10  # and the bytes of shared memory that they need then

# Of the marks of faults. They choose among what the kernels backward multiply, and Triton lays operands out for the
# narrowest number that is loaded to decide about them: kernels are shorter for two bytes than for one.
MARKS = torch.int16

# (num_warps, num_stages) of each kernel, by the width of its tiles over D.
LAUNCH = {
    "linear_forward": {16: (1, 2), 32: (2, 2), 64: (4, 2), 128: (8, 2)},
    "linear_replay": {16: (1, 2), 32: (2, 2), 64: (4, 2), 128: (8, 2)},
    "linear_reads": {16: (1, 1), 32: (2, 1), 64: (4, 1), 128: (8, 1)},
    "linear_backward": {16: (1, 1), 32: (2, 1), 64: (4, 1), 128: (8, 1)},
    "linear_step": {16: (1, 1), 32: (2, 1), 64: (4, 1), 128: (8, 1)},
    "mlp_step": {16: (2, 1), 32: (4, 1), 64: (8, 1), 128: (8, 1)},
    "mlp_forward": {16: (2, 1), 32: (4, 1), 64: (8, 1), 128: (8, 1)},
    "mlp_replay": {16: (2, 1), 32: (4, 1), 64: (4, 1), 128: (8, 1)},
    "mlp_reads": {16: (2, 1), 32: (4, 1), 64: (4, 1), 128: (8, 1)},
    "mlp_backward": {16: (2, 1), 32: (4, 1), 64: (4, 1), 128: (8, 1)},
    "mlp_forward_held": {16: (2, 2), 32: (4, 2), 64: (8, 2)},
    "mlp_replay_held": {16: (2, 1), 32: (4, 1), 64: (8, 1)},
    "mlp_reads_held": {16: (2, 2), 32: (4, 2), 64: (8, 2)},
    "mlp_walk_held": {16: (2, 2), 32: (4, 2), 64: (8, 2)},
    "mlp_end_held": {16: (2, 1), 32: (4, 1), 64: (8, 1)},
    "mlp_keys_held": {16: (2, 1), 32: (4, 1), 64: (4, 1)},
}

# The most registers of a thread, by the same width, where more programs on a processor are worth a little local memory:
# 128 let four programs of four warps run side by side, 168 three of them.
REGISTERS = {"linear_replay": {64: 168}, "linear_reads": {64: 128}}


def launch_options(kernel: str, dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Warps, stages and registers of `kernel`."""
    warps, stages = LAUNCH[kernel][block(dim)]
    # Products in float32 are made without matrix units and need more threads.
    warps = min(8, 2 * warps) if dtype == torch.float32 else warps
    # Left without a bound, the assembler gives some of the largest kernels 32 registers and local memory for the rest.
    registers = min(REGISTERS.get(kernel, {}).get(block(dim), 255), 2048 // warps)  # of 64 Ki of a multiprocessor
    return {"num_warps": warps, "num_stages": stages, "maxnreg": registers}


def empty_marks(q: Tensor) -> Tensor:
    """For the marks of faults of each token and head: [B, T, H], to be filled."""
    return q.new_empty(q.shape[:3], dtype=MARKS)


def shared_bytes(dim: int, chunk: int, dtype: torch.dtype) -> int:
    """A bound of the shared memory of the largest kernel, fitted to what the compiler asked for on sm_90."""
    return dtype.itemsize * block(dim) * (300 + 32 * block(chunk) // 5)


def shared_memory(device: torch.device) -> int:
    """Bytes that one block may have; where there is no GPU, those of an H100."""
    if device.type != "cuda":
        return 227 << 10
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


class Layout(NamedTuple):
    """Sizes of one call. length: tokens of each sequence, or of all where they are packed."""

    sequences: int
    length: int
    heads: int
    dim: int
    chunk: int
    packed: bool
    dtype: torch.dtype

    @staticmethod
    def of(q: Tensor, tau: Tensor, cu_seqlens: Tensor | None) -> "Layout":
        batch, length, heads, dim = q.shape
        sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        return Layout(sequences, length, heads, dim, tau.shape[0], cu_seqlens is not None, q.dtype)

    @property
    def tokens(self) -> int:
        return self.length if self.packed else self.sequences * self.length

    @property
    def every(self) -> int:
        """Mini-batches of a stretch, from one kept state to the next."""
        return KEEP_EVERY

    @property
    def reads(self) -> int:
        """Mini-batches that one program reads: a divisor of `every`."""
        return math.gcd(READ_AT_ONCE, KEEP_EVERY)

    @property
    def slots(self) -> int:
        """Room for the kept states of one head, whatever the lengths and phases of the sequences."""
        return self.tokens // (self.chunk * KEEP_EVERY) + 2 * self.sequences

    def constants(self, width: int | None = None) -> dict[str, Any]:
        """What kernels are compiled for, and whether sequences are packed. width: the memory's hidden units, if any."""
        hidden = {} if width is None else {"C": width, "BLOCK_C": min(HIDDEN_BLOCK, block(width))}
        return hidden | {
            "D": self.dim, "BLOCK_D": block(self.dim), "CHUNK": self.chunk, "BLOCK_K": block(self.chunk),
            "EVERY": KEEP_EVERY, "packed": int(self.packed),
            "PRECISION": "ieee" if self.dtype == torch.float32 else "tf32",
        }  # fmt: skip

    def held(self, stage: str, width: int, device: torch.device) -> bool:
        """Whether TTT-MLP's kernels of this pass hold a memory of `width` hidden units in registers, on this device."""
        wide, units = block(self.dim), block(width)
        fits = wide <= HELD_DIM and units <= min(HELD_WIDTH, 4 * wide) and block(self.chunk) <= HELD_CHUNK
        wanted = self.dtype.itemsize == 2 and MLP_DESIGN[stage] == "held"
        return wanted and fits and shared_memory(device) >= HELD_SHARED

    def held_constants(self, width: int) -> dict[str, Any]:
        """What the kernels that hold the memory are compiled for."""
        unused = ("BLOCK_C", "PRECISION")
        return {k: v for k, v in self.constants(width).items() if k not in unused} | {"WHOLE": block(width)}

    @property
    def warps(self) -> int:
        """Whose accumulators the kernels of a held memory fold what they hand on by."""
        return LAUNCH["mlp_walk_held"][block(self.dim)][0]

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        """Start `kernel` with the warps and stages that the table has for it. arguments: tensors, then numbers."""
        options = launch_options(kernel.fn.__name__, self.dim, self.dtype)
        cut = len(arguments)
        while not isinstance(arguments[cut - 1], Tensor):
            cut -= 1
        launch(kernel, grid, arguments[:cut], arguments[cut:], constants, options)

    def rows(self, like: Tensor, turns: int) -> Tensor:
        """Where each sequence leaves in each turn its gradients of what all share: [turns · N, H, CHUNK + 2 D]."""
        return like.new_empty(turns * self.sequences, self.heads, self.chunk + 2 * self.dim)

    def share_out(self, rows: Tensor, tau: Tensor, ln_weight: Tensor, ln_bias: Tensor) -> list[Tensor]:
        """The gradients of what sequences share: the sums of `rows`."""
        from fastweight.ops.ttt.kernels_shared import shared_totals

        totals = [torch.empty_like(x) for x in (tau, ln_weight, ln_bias)]
        launch(
            shared_totals, (self.heads + self.chunk,), (rows, *totals), (len(rows), self.heads),
            {"D": self.dim, "BLOCK_D": block(self.dim), "CHUNK": self.chunk}, {"num_warps": 4},
        )  # fmt: skip
        return totals


class Part(NamedTuple):
    """Mini-batches first … stop − 1 of every sequence, as stretches of KEEP_EVERY that are replayed side by side.

    owner: [stretches], the sequence of each, or their number where there is none. base: [N], each sequence's first.
    """

    first: int
    stop: int
    base: Tensor
    owner: Tensor


def parts(layout: Layout, position: Tensor, cu_seqlens: Tensor | None, state_bytes: int) -> list[Part]:
    """The parts of a backward pass, last first. state_bytes: of one replayed state of one head.

    A batch is cut the same way whatever its positions, and its tables are made once; packed sequences are cut on the
    device. Waits for it only where their states do not fit in REPLAY_BYTES: their longest must be known.
    """
    each, longest = state_bytes * KEEP_EVERY * layout.heads, layout.length
    lengths = None if cu_seqlens is None else cu_seqlens.diff().to(position)
    if lengths is not None and layout.slots * each > REPLAY_BYTES:
        longest = int(lengths.max())
    most = -(-((longest + 2 * layout.chunk - 2) // layout.chunk) // KEEP_EVERY)
    step = most if layout.slots * each <= REPLAY_BYTES else max(1, REPLAY_BYTES // (layout.sequences * each))
    found = []
    for first in range((most - 1) // step * step, -1, -step):
        if lengths is None:
            base, owner = _even(layout.sequences, min(step, most - first), position.device)
        else:
            base, owner = _by_length(layout, position, lengths, first, step)
        found.append(Part(first * KEEP_EVERY, (first + step) * KEEP_EVERY, base, owner))
    return found


def _even(sequences: int, each: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """base and owner of `each` stretches for every sequence."""
    recorded = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    # What is made while a graph is recorded belongs to that graph.
    return (_make_even if recorded else _even_tables)(sequences, each, device)


def _make_even(sequences: int, each: int, device: torch.device) -> tuple[Tensor, Tensor]:
    base = torch.arange(0, sequences * each, each, dtype=torch.int32, device=device)
    owner = torch.arange(sequences * each, dtype=torch.int32, device=device) // each
    return base, owner


_even_tables = functools.lru_cache(maxsize=64)(_make_even)


def _by_length(layout: Layout, position: Tensor, lengths: Tensor, first: int, step: int) -> tuple[Tensor, Tensor]:
    """base and owner of the stretches first … first + step − 1 of packed sequences, as many as each has."""
    chunks = (position % layout.chunk + lengths + layout.chunk - 1) // layout.chunk
    counts = ((chunks + KEEP_EVERY - 1) // KEEP_EVERY - first).clamp(0, step)
    ends = counts.cumsum(0)
    places = torch.arange(min(layout.sequences * step, layout.slots), device=position.device)
    owner = torch.searchsorted(ends, places, right=True, out_int32=True)
    return (ends - counts).to(torch.int32), owner
