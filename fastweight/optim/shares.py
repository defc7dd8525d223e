"""Work on a list of batches of matrices, dealt out to the ranks of a process group and gathered again."""

from collections.abc import Callable, Sequence
from functools import reduce

import torch
import torch.distributed as dist
from torch import Tensor

Share = dict[int, list[int]]


def num_ranks() -> int:
    """Processes that work together: 1 unless torch.distributed is initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def deal(shapes: Sequence[Sequence[int]], ranks: int) -> list[Share]:
    """Deal out the matrices of banks [N, A, B] so that every rank has about as much to multiply.

    Returns for each rank: bank → indices of its matrices. The dearest matrix first, each to the rank with least so far;
    the same on every rank, as it depends on the shapes alone.
    """
    costs = [(min(a, b) ** 2 * max(a, b), bank, i) for bank, (n, a, b) in enumerate(shapes) for i in range(n)]
    loads, shares = [0] * ranks, [Share() for _ in range(ranks)]
    for cost, bank, i in sorted(costs, key=lambda entry: (-entry[0], *entry[1:])):
        rank = loads.index(min(loads))
        loads[rank] += cost
        shares[rank].setdefault(bank, []).append(i)
    return shares


def map_shared(work: Callable[[Tensor], Tensor], banks: list[Tensor]) -> list[Tensor]:
    """[work(bank) for bank in banks], each rank doing its share; one all_gather. `work` keeps shapes and dtypes.

    Every rank must call it with banks of the same shapes, and with the same values: results come from one rank each.
    """
    ranks = num_ranks()
    if ranks == 1 or not banks:
        return [work(bank) for bank in banks]
    shares = deal([bank.shape for bank in banks], ranks)
    sizes = [sum(len(share[b]) * banks[b][0].numel() for b in share) for share in shares]
    dtype = reduce(torch.promote_types, (bank.dtype for bank in banks))
    own = shares[dist.get_rank()]
    done = [work(banks[b][own[b]]).reshape(-1).to(dtype) for b in sorted(own)]
    mine = torch.cat([*done, banks[0].new_zeros(max(sizes) - sum(map(len, done)), dtype=dtype)])
    gathered = mine.new_empty(ranks * len(mine))
    dist.all_gather_into_tensor(gathered, mine)
    return _unpacked(gathered.view(ranks, -1), shares, banks)


def _unpacked(gathered: Tensor, shares: list[Share], banks: list[Tensor]) -> list[Tensor]:
    results = [torch.empty_like(bank) for bank in banks]
    for row, share in zip(gathered, shares, strict=True):
        offset = 0
        for b in sorted(share):
            size = len(share[b]) * banks[b][0].numel()
            part = row[offset : offset + size].view(-1, *banks[b].shape[1:])
            results[b][share[b]] = part.to(banks[b].dtype)
            offset += size
    return results
