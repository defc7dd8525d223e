"""The merged weights in the folder: one object per merge of a fragment, and now and then a whole copy.

base/FF/VVVVVVVV: fragment F after merge V. With the codec fp32 it is the weights; with another it is the coded change
since V - 1, and full-VVVVVVVV has the weights that the changes add up to. Each has a .json with size and checksum
beside it, written after it.
"""

from collections.abc import Iterable

from torch import Tensor

from fastweight.configs import require
from fastweight.diloco.codecs import Encoded, codec
from fastweight.diloco.seals import digest, from_bytes, pack, to_bytes, unpack
from fastweight.diloco.storage import Storage

KEPT = 3
EXACT = "fp32"


def coded_change(down: str, weights: Tensor, shadow: Tensor) -> tuple[Encoded, Tensor]:
    """What is sent for new `weights` to workers that hold `shadow`, and what they hold then.

    Sent is the difference to what they hold, so what the codec lost before is in it (error feedback).
    """
    if down == EXACT:
        return {"values": weights}, weights.clone()
    encoded = codec(down).encode(weights - shadow)
    return encoded, shadow + codec(down).decode(encoded, weights.numel())


class Bases:
    """Reading and writing of merged weights. down: codec of the changes. full_every: merges between whole copies."""

    def __init__(self, storage: Storage, down: str, sizes: list[int], full_every: int):
        self.storage, self.down, self.sizes, self.full_every = storage, down, sizes, full_every

    def publish(self, fragment: int, version: int, change: Encoded, held: Tensor) -> None:
        """Write version `version` of a fragment. change: see `coded_change`; held: what the workers then hold."""
        if self.down == EXACT or version > 0:
            self._put(fragment, _piece(version), pack(change))
        if self.down != EXACT and version % self.full_every == 0:
            self._put(fragment, _full(version), pack({"values": held}))
        self._tidy(fragment, version)

    def fetch(self, fragment: int, version: int, have: tuple[int, Tensor] | None = None) -> Tensor:
        """Version `version` of a fragment. have: the version and vector that the reader holds.

        Raises FileNotFoundError if it is no longer kept, ValueError if it is damaged.
        """
        if self.down == EXACT:
            return self._get(fragment, _piece(version), EXACT)
        start, vector = self._start(fragment, version, have)
        for number in range(start + 1, version + 1):
            vector = vector + self._get(fragment, _piece(number), self.down)
        return vector

    def _start(self, fragment: int, version: int, have: tuple[int, Tensor] | None) -> tuple[int, Tensor]:
        """The nearest point from which the changes lead to `version`: what is there already, or a whole copy."""
        full = max((n for n in self._fulls(fragment) if n <= version), default=None)
        if have is not None and have[0] <= version and (full is None or full <= have[0]):
            return have
        if full is None:
            raise FileNotFoundError(f"{self.storage.url}: fragment {fragment} has no whole copy before {version}.")
        # Where the changes since are still there they are fewer bytes than a whole copy.
        if have is not None and have[0] <= version and self._has_pieces(fragment, range(have[0] + 1, version + 1)):
            return have
        return full, self._get(fragment, _full(full), EXACT)

    def _has_pieces(self, fragment: int, versions: Iterable[int]) -> bool:
        names = set(self.storage.names(f"base/{fragment:02d}"))
        return all(f"{_piece(version)}.json" in names for version in versions)

    def _fulls(self, fragment: int) -> list[int]:
        names = self.storage.names(f"base/{fragment:02d}")
        return [int(name[5:13]) for name in names if name.startswith("full-") and name.endswith(".json")]

    def _tidy(self, fragment: int, version: int) -> None:
        """Remove what nobody starts from: whole copies but two, and changes before the older of them."""
        if self.down == EXACT:
            oldest = version - KEPT
            if oldest >= 0:
                self._drop(fragment, _piece(oldest))
        elif version % self.full_every == 0 and version >= 2 * self.full_every:
            oldest = version - self.full_every
            for number in range(oldest - self.full_every, oldest):
                self._drop(fragment, _piece(number))
            self._drop(fragment, _full(oldest - self.full_every))

    def _drop(self, fragment: int, name: str) -> None:
        for kind in ("json", "safetensors"):
            self.storage.remove(f"base/{fragment:02d}/{name}.{kind}")

    def _put(self, fragment: int, name: str, data: bytes) -> None:
        path = f"base/{fragment:02d}/{name}"
        self.storage.write(f"{path}.safetensors", data)
        self.storage.write(f"{path}.json", to_bytes({"size": len(data), "sha256": digest(data)}))

    def _get(self, fragment: int, name: str, coded: str) -> Tensor:
        path = f"base/{fragment:02d}/{name}"
        record = from_bytes(self.storage.read(f"{path}.json"), path)
        data = self.storage.read(f"{path}.safetensors")
        require(digest(data) == record["sha256"], f"{self.storage.url}: {path} is damaged (checksum). Restore it.")
        return codec(coded).decode(unpack(data, path), self.sizes[fragment])


def _piece(version: int) -> str:
    return f"{version:08d}"


def _full(version: int) -> str:
    return f"full-{version:08d}"
