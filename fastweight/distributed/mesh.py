"""How the processes of a run are arranged: replicas of the model, each cut into shards; sequences cut over several;
groups that come and go."""

from dataclasses import dataclass
from typing import Literal

from fastweight.configs import check_types, require

Gather = Literal["own", "bfloat16"]
REPLICATE, SHARD, CONTEXT = "replicate", "shard", "context"


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """replicate × shard × context processes. Each replica holds all weights once, cut over its `shard` processes; each
    of these is `context` processes, with the same weights, that read a part of every sequence each."""

    replicate: int = 1
    """Copies of the model."""
    shard: int = 0
    """Processes that share one copy; 0: all there are, divided by `replicate` and `context`."""
    context: int = 1
    """Processes that share a sequence: it is cut into so many parts along T."""
    turns: int = 1
    """How often a text goes round the processes of `context`: each reads every context-th of turns · context pieces.
    More turns, shorter waits at the ends of a pass, and more hand-overs. Above 1, context must be 3 or more."""
    gather: Gather = "own"
    """Dtype in which the weights of a block travel to those who compute it: their own, or bfloat16, which is half the
    traffic and memory of float32, and rounds norms and initial memories too. Gradients are summed in float32."""
    timeout_seconds: int = 600
    """A process that waits longer than this for the others ends the run."""

    def __post_init__(self) -> None:
        check_types(self, "mesh")
        require(self.replicate >= 1, f"mesh: replicate must be at least 1, got {self.replicate}.")
        require(self.shard >= 0, f"mesh: shard must not be negative, got {self.shard}.")
        require(self.context >= 1, f"mesh: context must be at least 1, got {self.context}.")
        require(
            self.turns == 1 or (self.turns > 1 and self.context >= 3),
            f"mesh: turns must be 1, or more with context 3 or more, got {self.turns} with context {self.context}.",
        )
        require(self.timeout_seconds >= 1, f"mesh: timeout_seconds must be positive, got {self.timeout_seconds}.")

    def fits(self, processes: int) -> bool:
        """Whether so many processes can be arranged like this."""
        return self.replicate * self._shards(processes) * self.context == processes

    def sizes(self, processes: int) -> tuple[int, int]:
        """(replicate, shard) for so many processes. Raises ValueError if they do not fit."""
        shard = self._shards(processes)
        wanted = self.replicate * shard * self.context
        cut = f" × context {self.context}" if self.context > 1 else ""
        settings = "mesh.replicate, mesh.shard and mesh.context" if cut else "mesh.replicate and mesh.shard"
        require(
            wanted == processes,
            f"mesh: replicate {self.replicate} × shard {self.shard or 'any'}{cut} needs {wanted} processes, there "
            f"{'is' if processes == 1 else 'are'} {processes}. Start so many (torchrun --nproc-per-node {wanted} -m "
            f"fastweight train ...), or change {settings}.",
        )
        return self.replicate, shard

    def _shards(self, processes: int) -> int:
        return self.shard or max(1, processes // (self.replicate * self.context))


@dataclass(frozen=True, kw_only=True)
class ReplicaConfig:
    """Replica groups through torchft; each has a run folder of its own, and one process or those of `mesh`."""

    most: int = 0
    """Groups that there may be at once; batch_size must be a multiple of each number up to it. 0: no groups."""
    least: int = 1
    """With fewer groups than this no step counts."""
    lighthouse: str = ""
    """Address of torchft_lighthouse, e.g. http://host:29510."""
    timeout_seconds: int = 60
    """An exchange between groups that takes longer has failed; its step is made again."""
    wait_seconds: int = 600
    """A group to which the lighthouse does not answer for so long ends. It answers when enough groups have come."""
    every: int = 0
    """DiLoCo: steps that each group makes alone between two exchanges of the same weights; 0: gradients are exchanged
    at every step."""
    fragments: int = 1
    """every: parts of the model that are exchanged in turn, one after each every / fragments steps (streaming)."""
    overlap_steps: int = 0
    """every: steps that a group goes on while an exchange is under way; 0: it waits."""
    blend: float = 0.0
    """overlap_steps: part of the group's own weights that stays when it takes over the common ones."""
    outer_lr: float = 0.7
    """every: rate at which the common weights follow the mean of the groups' moves; 1 with outer_momentum 0: they
    become the mean of the groups' weights."""
    outer_momentum: float = 0.9
    """every: Nesterov's momentum of these moves; 0: none."""

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
        for name in ("timeout_seconds", "wait_seconds"):
            require(getattr(self, name) >= 1, f"replicas: {name} must be positive, got {getattr(self, name)}.")
        self._check_rounds()

    def _check_rounds(self) -> None:
        require(self.every >= 0, f"replicas: every must not be negative, got {self.every}.")
        require(self.every == 0 or self.most > 0, "replicas: every belongs to groups. Set most to their number, too.")
        for name, unused in (("fragments", 1), ("overlap_steps", 0), ("blend", 0.0)):
            value = getattr(self, name)
            require(value >= unused, f"replicas: {name} must be at least {unused}, got {value}.")
            require(
                self.every > 0 or value == unused,
                f"replicas: {name} {value} belongs to groups that train alone for a while. Set every to so many steps.",
            )
        require(
            self.every % self.fragments == 0,
            f"replicas: every ({self.every}) must be a multiple of fragments ({self.fragments}).",
        )
        length = self.every // self.fragments
        require(
            self.overlap_steps < max(1, length),
            f"replicas: overlap_steps must be below every / fragments ({length}), got {self.overlap_steps}.",
        )
        require(self.blend <= 1, f"replicas: blend must lie in [0, 1], got {self.blend}.")
        require(self.blend == 0 or self.overlap_steps > 0, "replicas: blend needs overlap_steps; set it to 0.")
        require(self.outer_lr > 0, f"replicas: outer_lr must be positive, got {self.outer_lr}.")
        require(
            0 <= self.outer_momentum < 1, f"replicas: outer_momentum must lie in [0, 1), got {self.outer_momentum}."
        )


def share_of_batch(batch_size: int, processes: int) -> int:
    """Sequences of a step that each process reads (those of a context together). Raises ValueError if they cannot be
    dealt out evenly."""
    fits = [n for n in range(1, batch_size + 1) if batch_size % n == 0]
    require(
        batch_size % processes == 0,
        f"data: batch_size {batch_size} cannot be dealt out evenly to {processes} processes. Start "
        f"{', '.join(map(str, fits[-6:]))} of them, or set data.batch_size to a multiple of {processes}.",
    )
    return batch_size // processes
