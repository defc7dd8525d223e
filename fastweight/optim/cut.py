"""Work on whole matrices whose rows lie on several processes: each matrix is put together once, on one of them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastweight.optim.shares import Share, deal

Sizes = list[list[int]]


class Cut(NamedTuple):
    """How matrices are cut: `shards` processes hold a part of the rows each, and `replicas` sets of them hold them all.

    shard, replica: the place of this process. shard_group, replica_group: the processes that differ in that place
    alone.
    """

    shards: int
    shard: int
    shard_group: dist.ProcessGroup
    replicas: int
    replica: int
    replica_group: dist.ProcessGroup | None

    def rows(self, rows: int, shard: int) -> int:
        """How many of a matrix's rows the process `shard` holds."""
        most = -(-rows // self.shards)
        return max(0, min(most, rows - shard * most))

    def slice(self, rows: int) -> slice:
        """Which of a matrix's rows this process holds."""
        most = -(-rows // self.shards)
        return slice(min(rows, self.shard * most), min(rows, (self.shard + 1) * most))


def cut_of(p: Tensor) -> Cut | None:
    """How the parameter `p` is cut along its rows, None if it is whole (a plain tensor)."""
    if not hasattr(p, "to_local"):
        return None
    mesh: Any = p.device_mesh  # type: ignore[attr-defined]  # a DTensor
    if mesh.ndim == 1:
        return Cut(mesh.size(), mesh.get_local_rank(), mesh.get_group(), 1, 0, None)
    (replicas, shards), (replica, shard) = (mesh.size(0), mesh.size(1)), mesh.get_coordinate()
    return Cut(shards, shard, mesh.get_group(1), replicas, replica, mesh.get_group(0))


def local(p: Tensor) -> Tensor:
    """The part of `p` that this process holds; changes of it are changes of `p`."""
    return p.to_local() if hasattr(p, "to_local") else p  # type: ignore[attr-defined]  # a DTensor


def map_cut(
    work: Callable[[Tensor], Tensor], banks: list[Tensor], num_rows: Sequence[int], cut: Cut
) -> tuple[list[Tensor], list[Tensor]]:
    """`work` on banks of whole matrices [N, A, B], of which this process has rows: [N, a, B], num_rows the A of each.

    Every matrix goes to one process, by cost, and its rows go back. Returns the rows of the results, and for each bank
    the mean squares of the whole results over their shorter side, [N, A, 1] or [N, 1, B]. `work` keeps shapes and
    dtypes. All processes must call it with the same shapes.
    """
    shapes = [(len(bank), rows, bank.shape[-1]) for bank, rows in zip(banks, num_rows, strict=True)]
    dealt = deal(shapes, cut.replicas * cut.shards)
    shares = dealt[cut.replica * cut.shards : (cut.replica + 1) * cut.shards]
    exchange = _Exchange(shapes, shares, cut)
    done = [work(matrices) for matrices in exchange.collect(banks)]
    results = exchange.give_back(done, banks)
    squares = [_mean_squares(shape, banks[0]) for shape in shapes]
    for bank, matrices in zip(sorted(shares[cut.shard]), done, strict=True):
        squares[bank][shares[cut.shard][bank]] = matrices.square().mean(short_side(matrices), keepdim=True)
    _add(squares, cut.shard_group)
    if cut.replica_group is not None:
        _add(results, cut.replica_group)
        _add(squares, cut.replica_group)
    return results, squares


def short_side(matrices: Tensor) -> int:
    """The dimension of matrices [..., A, B] that is the shorter one; columns where they are as many as rows."""
    return -1 if matrices.shape[-2] >= matrices.shape[-1] else -2


class _Exchange:
    """Sends rows to the processes that own the matrices, and back."""

    def __init__(self, shapes: list[tuple[int, int, int]], shares: list[Share], cut: Cut):
        self.shapes, self.shares, self.cut = shapes, shares, cut
        self.own = shares[cut.shard]

    def collect(self, banks: list[Tensor]) -> list[Tensor]:
        """The whole matrices [n, A, B] that this process owns, bank by bank."""
        sent = [banks[b][share[b]].reshape(-1) for share in self.shares for b in sorted(share)]
        received = self._send(banks[0], sent, self._sizes_out(), self._sizes_in())
        parts = [iter(self._views(piece, self.own, shard)) for shard, piece in enumerate(received)]
        return [torch.cat([next(part) for part in parts], 1) for _ in self.own]

    def give_back(self, done: list[Tensor], banks: list[Tensor]) -> list[Tensor]:
        """The rows of all matrices of this replica that this process holds; zeros for those of other replicas."""
        cuts = [matrices.split(self._rows_of(b), 1) for b, matrices in zip(sorted(self.own), done, strict=True)]
        sent = [pieces[shard].reshape(-1) for shard in range(self.cut.shards) for pieces in cuts]
        received = self._send(banks[0], sent, self._sizes_in(), self._sizes_out())
        results = [torch.zeros_like(bank) for bank in banks]
        for share, piece in zip(self.shares, received, strict=True):
            for b, rows in zip(sorted(share), self._views(piece, share, self.cut.shard), strict=True):
                results[b][share[b]] = rows
        return results

    def _rows_of(self, bank: int) -> list[int]:
        return [self.cut.rows(self.shapes[bank][1], shard) for shard in range(self.cut.shards)]

    def _sizes_out(self) -> list[int]:
        """Numbers that this process holds of the matrices of each process."""
        return [sum(self._numel(share, b, self.cut.shard) for b in share) for share in self.shares]

    def _sizes_in(self) -> list[int]:
        """Numbers that each process holds of the matrices of this one."""
        return [sum(self._numel(self.own, b, shard) for b in self.own) for shard in range(self.cut.shards)]

    def _numel(self, share: Share, bank: int, shard: int) -> int:
        _, rows, columns = self.shapes[bank]
        return len(share[bank]) * self.cut.rows(rows, shard) * columns

    def _views(self, piece: Tensor, share: Share, shard: int) -> list[Tensor]:
        """The numbers that came from, or for, process `shard`, as [n, a, B] per bank."""
        sizes = [self._numel(share, b, shard) for b in sorted(share)]
        parts = zip(sorted(share), piece.split(sizes), strict=True)
        return [
            part.view(len(share[b]), self.cut.rows(self.shapes[b][1], shard), self.shapes[b][2]) for b, part in parts
        ]

    def _send(self, like: Tensor, pieces: list[Tensor], out: list[int], into: list[int]) -> tuple[Tensor, ...]:
        sent = torch.cat(pieces) if pieces else like.new_empty(0)
        received = like.new_empty(sum(into))
        dist.all_to_all_single(received, sent, into, out, group=self.cut.shard_group)
        return received.split(into)


def _mean_squares(shape: tuple[int, int, int], like: Tensor) -> Tensor:
    n, rows, columns = shape
    return like.new_zeros((n, rows, 1) if rows >= columns else (n, 1, columns))


def _add(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    for tensor in tensors:
        dist.all_reduce(tensor, group=group)
