"""Who sees whom, in blocks, written down without a look at every pair of tokens.

All queries stand in one run. Before the run of their keys stands, end to end, what sequences kept from earlier calls:
sinks, then cached keys. Each key is seen by one interval of queries, whatever the window, the documents and the caches
are; so a block of keys is read by a run of blocks of queries, and those runs are all that is listed: O(T · W / BLOCK²).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 128  # queries and keys per block of the lists; a tile, not part of the function
FAR = 1 << 30  # further than any token


class Layout(NamedTuple):
    """Where sequences of `lengths` tokens stand, and what each sees.

    apart: rows of a batch, of one length; each fills whole blocks of its own. Otherwise packed documents, end to end.
    num_sinks, slots: keys kept per sequence, of its first tokens and of its last ones.
    """

    lengths: tuple[int, ...]
    apart: bool
    window: int | None
    num_sinks: int
    slots: int

    @property
    def stride(self) -> int:
        """Queries per row of the input, filled up to whole blocks: two at least in all, for sizes of 1 are special
        to compilers."""
        rows = len(self.lengths) if self.apart else 1
        length = self.lengths[0] if self.apart else sum(self.lengths)
        return max(_whole(length), 2 * BLOCK if rows == 1 else 0)

    @property
    def kept_stride(self) -> int:
        """Kept keys per row of the input, filled up to whole blocks."""
        kept = self.num_sinks + self.slots
        return _whole(kept if self.apart else kept * len(self.lengths))

    def bounds(self) -> tuple[Tensor, Tensor]:
        """First query of each sequence, and the query after its last: [N] twice."""
        lengths = torch.tensor(self.lengths)
        starts = torch.arange(len(lengths)) * self.stride if self.apart else lengths.cumsum(0) - lengths
        return starts, starts + lengths


class Lists(NamedTuple):
    """For each block (rows) how many blocks of the other side it meets [1, 1, rows], and which [1, 1, rows, most]."""

    lengths: Tensor
    blocks: Tensor


class Sight(NamedTuple):
    """What a layout fixes. Partly seen blocks need a look at the tokens' intervals, fully seen ones do not.

    keys, full_keys: blocks of keys per block of queries; queries, full_queries: the same pairs the other way around.
    seen_from, seen_until: [queries] int32, the interval of queries that sees each new token. reach: [] int32, how
    many they are where nothing ends: all that a single sequence without kept keys needs. starts, ends: [N].
    """

    keys: Lists
    full_keys: Lists
    queries: Lists
    full_queries: Lists
    seen_from: Tensor
    seen_until: Tensor
    reach: Tensor
    starts: Tensor
    ends: Tensor


def fill_up(x: Tensor, length: int, value: int = 0) -> Tensor:
    """[rows, n, ...] → [rows · length, ...], each row filled up with `value`."""
    missing = length - x.shape[1]
    return (F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing), value=value) if missing else x).flatten(0, 1)


def kept_intervals(starts: Tensor, ends: Tensor, position: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """First query that sees each kept key and the one after the last: [N, num_sinks + slots] twice, sinks first.

    position: [N], tokens read before. Slots that no token filled are seen by no query; a cached sink is seen by those
    out of whose window it is.
    """
    starts, ends, position = (x[:, None] for x in (starts, ends, position))
    window = FAR if layout.window is None else layout.window
    sink = torch.arange(layout.num_sinks, device=position.device) - position  # place after the first new token
    slot = torch.arange(-layout.slots, 0, device=position.device)
    until = torch.where(slot >= -position, torch.minimum(starts + slot + window, ends), 0)
    seen_from = (starts + (sink + window).clamp(min=0), starts.expand_as(until))
    return torch.cat(seen_from, 1), torch.cat((ends.expand_as(sink), until), 1)


def look(layout: Layout) -> Sight:
    """The lists and intervals of a layout, made on the CPU; kept keys count as seen wherever they could be."""
    starts, ends = layout.bounds()
    seen_from, seen_until = _new_intervals(starts, ends, layout)
    kept = kept_intervals(starts, ends, torch.full_like(starts, FAR), layout)
    rows = len(starts) if layout.apart else 1
    kept_from, kept_until = (fill_up(x.reshape(rows, -1), layout.kept_stride) for x in kept)
    num_kept = len(kept_from) // BLOCK
    partly, fully = _pairs(torch.cat((kept_from, seen_from)), torch.cat((kept_until, seen_until)), num_kept)
    num_queries, num_keys = len(seen_from) // BLOCK, num_kept + len(seen_from) // BLOCK
    reach = torch.tensor(FAR if layout.window is None else layout.window, dtype=torch.int32)
    keys, full_keys = _lists([(query, key) for key, query in (partly, fully)], num_queries)
    queries, full_queries = _lists([partly, fully], num_keys)
    return Sight(
        keys=keys, full_keys=full_keys, queries=queries, full_queries=full_queries,
        seen_from=seen_from.int(), seen_until=seen_until.int(), reach=reach, starts=starts, ends=ends,
    )  # fmt: skip


def _new_intervals(starts: Tensor, ends: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """The queries that see each new token: its own and those after it in reach. What fills up sees itself alone."""
    lengths = ends - starts
    seen_from = torch.arange(layout.stride * (len(starts) if layout.apart else 1))
    owner = torch.arange(len(starts)).repeat_interleave(lengths)
    token = starts[owner] + torch.arange(len(owner)) - (lengths.cumsum(0) - lengths)[owner]
    seen_until = seen_from + 1
    seen_until[token] = torch.minimum(token + (FAR if layout.window is None else layout.window), ends[owner])
    return seen_from, seen_until


def _pairs(seen_from: Tensor, seen_until: Tensor, num_kept: int) -> list[tuple[Tensor, Tensor]]:
    """Blocks of keys and of queries that meet, ordered by keys: those partly seen, and those fully seen.

    The first `num_kept` blocks of keys never count as fully seen: what is in them shows in the call.
    """
    empty = seen_until <= seen_from
    first, last = (torch.where(empty, x, y).unflatten(0, (-1, BLOCK)) for x, y in ((FAR, seen_from), (0, seen_until)))
    least, most = first.amin(1) // BLOCK, -(-last.amax(1) // BLOCK)  # blocks of queries that see anything of it
    whole, after = -(-first.amax(1) // BLOCK), last.amin(1) // BLOCK  # those that see all of it
    after[:num_kept] = 0
    width = max(int((most - least).max()), 1)
    query = least[:, None] + torch.arange(width)
    meet = query < most[:, None]
    full = meet & (query >= whole[:, None]) & (query < after[:, None])
    return [(chosen.nonzero()[:, 0], query[chosen]) for chosen in (meet & ~full, full)]


def _lists(pairs: list[tuple[Tensor, Tensor]], num_rows: int) -> list[Lists]:
    """Pairs (row, block) by row, each row's blocks in the order they come in.

    All lists are of one width, two at least: the kernels of PyTorch 2.11 step through a list of full blocks by the
    width of the other one.
    """
    counts = [rows.bincount(minlength=num_rows) for rows, _ in pairs]
    width = max(2, *(int(count.max()) for count in counts))
    found = []
    for (rows, blocks), count in zip(pairs, counts, strict=True):
        order = rows.argsort(stable=True)
        rows, blocks = rows[order], blocks[order]
        place = torch.arange(len(rows)) - (count.cumsum(0) - count)[rows]
        table = torch.zeros(num_rows, width, dtype=torch.int32)
        table[rows, place] = blocks.int()
        found.append(Lists(count.int()[None, None], table[None, None]))
    return found


def _whole(length: int) -> int:
    return -(-length // BLOCK) * BLOCK
