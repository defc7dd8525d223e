"""Long documents read window after window, with the state carried from one batch to the next."""

import heapq

import numpy as np
import torch

from fastweight.data.batches import Batch
from fastweight.data.packing import document_pieces
from fastweight.data.sampler import Sampler, derive_seed
from fastweight.data.store import Split
from fastweight.data.views import dense_batch, need_positive, need_samples


class Streams:
    """Each of `lanes` rows walks through its own documents, `seq_len` tokens per batch. Dense [lanes, T] + `continues`.

    continues[b] says that row b goes on in the document of row b of the batch before; where it is False the row starts
    a document, and its state must start fresh. The last window of a document is padded with ignored targets.

    Sample number s * lanes + b is row b of step s, so every batch follows from its number alone. Documents are dealt to
    the lanes once, longest first to the lane with least to do (Graham 1969, "Bounds on multiprocessing timing
    anomalies"); each epoch visits a lane's documents once, in an order of its own. Lanes that are through wait for the
    longest one in rows of ignored targets (`efficiency` says what that and the padding cost).
    """

    ordered = True

    def __init__(self, split: Split, seq_len: int, lanes: int, seed: int = 0) -> None:
        need_positive("Streams: seq_len", seq_len)
        need_positive("Streams: lanes", lanes)
        self.split, self.seq_len, self.lanes, self.seed = split, seq_len, lanes, seed
        self._targets = split.document_ends - split.document_starts - 1
        self._windows = document_pieces(split, seq_len)[2]
        self._lane_documents = _deal(self._windows, lanes)
        self.steps_per_epoch = max(int(self._windows[documents].sum()) for documents in self._lane_documents)
        self._orders: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        need_samples(self, "a stream needs a document")
        if any(not len(documents) for documents in self._lane_documents):
            raise ValueError(f"Streams: {lanes} lanes but only {(self._windows > 0).sum()} documents. Use fewer lanes.")

    def __len__(self) -> int:
        return self.steps_per_epoch * self.lanes

    @property
    def efficiency(self) -> float:
        """Targets of an epoch as a fraction of the places in its rows."""
        return float(self._targets.sum() / (len(self) * self.seq_len))

    def batch(self, sample_numbers: np.ndarray) -> Batch:
        """Return the rows with these numbers; beyond len(self) the next epochs follow."""
        numbers = np.asarray(sample_numbers, dtype=np.int64).reshape(-1)
        if not numbers.size or numbers.min() < 0:
            raise IndexError(
                f"Streams: sample numbers start at 0 and at least one is needed, got {numbers[:8].tolist()}."
            )
        rows = [self._locate(*divmod(number, self.lanes)) for number in numbers.tolist()]
        starts, lengths, places = np.array(rows, dtype=np.int64).T
        return dense_batch(self.split, starts, lengths, self.seq_len, continues=torch.from_numpy(places > 0))

    def _locate(self, step: int, lane: int) -> tuple[int, int, int]:
        """Start, length and number within its document of the window that `lane` reads at `step`; idle: 0, 0, 0."""
        epoch, step = divmod(step, self.steps_per_epoch)
        documents, ends = self._order(epoch, lane)
        place = int(np.searchsorted(ends, step, side="right"))
        if place == len(documents):
            return 0, 0, 0
        document = int(documents[place])
        window = step - int(ends[place] - self._windows[document])
        length = min(self.seq_len, int(self._targets[document]) - window * self.seq_len)
        return int(self.split.document_starts[document]) + window * self.seq_len, length, window

    def _order(self, epoch: int, lane: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents of `lane` in the order of `epoch`, and the step after the last window of each."""
        if (epoch, lane) not in self._orders:
            if len(self._orders) >= 2 * self.lanes:
                self._orders.clear()
            documents = self._lane_documents[lane]
            sampler = Sampler(len(documents), derive_seed(self.seed, epoch, lane))
            documents = documents[sampler.locate(np.arange(len(documents)))[1]]
            self._orders[epoch, lane] = documents, np.cumsum(self._windows[documents])
        return self._orders[epoch, lane]


def _deal(windows: np.ndarray, lanes: int) -> list[np.ndarray]:
    """Return the documents of each lane; documents without a window go nowhere."""
    chosen: list[list[int]] = [[] for _ in range(lanes)]
    heap = [(0, lane) for lane in range(lanes)]
    for document in np.argsort(-windows, kind="stable").tolist():
        if windows[document]:
            load, lane = heap[0]
            chosen[lane].append(document)
            heapq.heapreplace(heap, (load + int(windows[document]), lane))
    return [np.array(documents, dtype=np.int64) for documents in chosen]
