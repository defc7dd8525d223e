"""The same run on many processes: who they are, how the weights lie on them, how they agree."""

from fastweight.distributed.mesh import MeshConfig

__all__ = ["MeshConfig"]
