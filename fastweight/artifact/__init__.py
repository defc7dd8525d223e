"""A model in a small file: quantisation with GPTQ, entropy coding, one checked file, and fitting it under a cap."""

from fastweight.artifact.describe import GroupReport, Report, TensorReport, describe
from fastweight.artifact.fake_quantise import fake_quantise, fake_quantised
from fastweight.artifact.file import ArtifactError, write
from fastweight.artifact.fit import CapError, Fitted, fit_to_size
from fastweight.artifact.groups import tensor_groups
from fastweight.artifact.hessians import Hessians, collect_hessians
from fastweight.artifact.pack import pack, unpack, unpack_tokenizer
from fastweight.artifact.spec import GroupSpec, LowRankSpec, PackSpec

__all__ = [
    "ArtifactError",
    "CapError",
    "Fitted",
    "GroupReport",
    "GroupSpec",
    "Hessians",
    "LowRankSpec",
    "PackSpec",
    "Report",
    "TensorReport",
    "collect_hessians",
    "describe",
    "fake_quantise",
    "fake_quantised",
    "fit_to_size",
    "pack",
    "tensor_groups",
    "unpack",
    "unpack_tokenizer",
    "write",
]
