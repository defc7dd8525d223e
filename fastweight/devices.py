"""The device that a name stands for."""

import importlib.metadata

import torch

from fastweight.configs import require


def pick_device(name: str) -> torch.device:
    """The device called `name`, "auto" being a GPU if there is one. Raises ValueError for one that is not here."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}. Use auto, cpu, cuda or cuda:0.") from error
    require(device.type in ("cpu", "cuda"), f"device {name!r} is not supported. Use auto, cpu, cuda or cuda:0.")
    number = int(name.partition(":")[2] or 0)  # device.index wraps around: torch reads cuda:256 as cuda:0
    require(
        device.type == "cpu" or number < count,
        f"device {name!r} does not exist: torch {torch.__version__} sees {count} CUDA GPU(s) here, counted from 0. "
        "Use auto or cpu.",
    )
    return device


def package_version(package: str) -> str | None:
    """The installed version of a package, None if there is none; the package is not imported."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
