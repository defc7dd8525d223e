"""How the processes of a run are arranged: replicas of the model, each cut into shards; groups that come and go."""

from dataclasses import dataclass
from typing import Literal

from fastweight.configs import check_types, require

Gather = Literal["own", "bfloat16"]
REPLICATE, SHARD = "replicate", "shard"


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """replicate × shard processes. Each replica holds all weights once, cut over its `shard` processes."""

    replicate: int = 1
    """Copies of the model."""
    shard: int = 0
    """Processes that share one copy; 0: all there are, divided by `replicate`."""
    gather: Gather = "own"
    """Dtype in which the weights of a block travel to those who compute it: their own, or bfloat16, which is half the
    traffic and memory of float32, and rounds norms and initial memories too. Gradients are summed in float32."""
    timeout_seconds: int = 600
    """A process that waits longer than this for the others ends the run."""

    def __post_init__(self) -> None:
        check_types(self, "mesh")
        require(self.replicate >= 1, f"mesh: replicate must be at least 1, got {self.replicate}.")
        require(self.shard >= 0, f"mesh: shard must not be negative, got {self.shard}.")
        require(self.timeout_seconds >= 1, f"mesh: timeout_seconds must be positive, got {self.timeout_seconds}.")

    def fits(self, processes: int) -> bool:
        """Whether so many processes can be arranged like this."""
        return self.replicate * self._shards(processes) == processes

    def sizes(self, processes: int) -> tuple[int, int]:
        """(replicate, shard) for so many processes. Raises ValueError if they do not fit."""
        shard = self._shards(processes)
        wanted = self.replicate * shard
        require(
            wanted == processes,
            f"mesh: replicate {self.replicate} × shard {self.shard or 'any'} needs {wanted} processes, there "
            f"{'is' if processes == 1 else 'are'} {processes}. Start so many (torchrun --nproc-per-node {wanted} -m "
            "fastweight train ...), or change mesh.replicate and mesh.shard.",
        )
        return self.replicate, shard

    def _shards(self, processes: int) -> int:
        return self.shard or max(1, processes // self.replicate)


@dataclass(frozen=True, kw_only=True)
class ReplicaConfig:
    """Replica groups through torchft; each is one process with a run folder of its own."""

    most: int = 0
    """Groups that there may be at once; batch_size must be a multiple of each number up to it. 0: no groups."""
    least: int = 1
    """With fewer groups than this no step counts."""
    lighthouse: str = ""
    """Address of torchft_lighthouse, e.g. http://host:29510."""
    timeout_seconds: int = 60
    """An exchange between groups that takes longer has failed; its step is made again."""

    def __post_init__(self) -> None:
        check_types(self, "replicas")
        require(self.most >= 0, f"replicas: most must not be negative, got {self.most}.")
        require(
            1 <= self.least <= max(1, self.most),
            f"replicas: least must lie in 1 .. most ({self.most}), got {self.least}.",
        )
        require(
            not self.most or self.lighthouse.startswith("http"),
            f"replicas: lighthouse {self.lighthouse!r}: give the address of a running torchft_lighthouse, "
            "e.g. http://host:29510.",
        )
        require(self.timeout_seconds >= 1, f"replicas: timeout_seconds must be positive, got {self.timeout_seconds}.")


def share_of_batch(batch_size: int, processes: int) -> int:
    """Sequences of a step that each process reads. Raises ValueError if they cannot be dealt out evenly."""
    fits = [n for n in range(1, batch_size + 1) if batch_size % n == 0]
    require(
        batch_size % processes == 0,
        f"data: batch_size {batch_size} cannot be dealt out evenly to {processes} processes. Start "
        f"{', '.join(map(str, fits[-6:]))} of them, or set data.batch_size to a multiple of {processes}.",
    )
    return batch_size // processes
