"""What is installed here, and what will therefore run."""

import os
import platform
from typing import Any

import torch

import fastweight.mixers  # noqa: F401  # registers every op's backends
from fastweight import __version__, accuracy
from fastweight.devices import package_version
from fastweight.ops import dispatch

REQUIRED = ("torch", "numpy", "safetensors", "tokenizers", "tyro", "rich", "matplotlib", "msgpack")
DTYPES = (("float32", torch.float32), ("bfloat16", torch.bfloat16))
OPTIONAL = {
    "triton": "GPU kernels",
    "fla-core": "GPU kernels of the delta rule",
    "transformers": "the Hugging Face interface",
    "pyarrow": "parquet and arrow data",
    "zstandard": ".zst data",
    "datasets": "hf: data",
    "tensorboard": "TensorBoard logs",
    "wandb": "Weights & Biases logs",
}


def examine(*, measure: bool = False) -> dict[str, Any]:
    """Versions, devices, and for each device and op every backend with the reason why it cannot run (None: it can).

    measure: first run every backend beside the definition and keep how far it is from it; otherwise what is known from
    the last time is given.
    """
    if measure:
        for device in available_devices():
            for _, dtype in DTYPES:
                accuracy.remember(device, dtype, accuracy.measure(device, dtype))
    devices = [_describe_device(device) for device in available_devices()]
    return {
        "fastweight": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: package_version(name) for name in REQUIRED},
        "optional_packages": {name: package_version(name) for name in OPTIONAL},
        "torch_cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "cpu_cores": os.cpu_count(),
        "devices": devices,
        "backends": {
            f"{d['name']} {short}": backends_on(torch.device(d["name"]), t) for d in devices for short, t in DTYPES
        },
    }


def available_devices() -> list[torch.device]:
    """The CPU and every CUDA device."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(count))]


def backends_on(device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """For each op: what "auto" takes for a long sequence and for one token, why others cannot run, and how exact each
    is on this machine as far as it was measured."""
    found, known = {}, accuracy.recall(device, dtype)
    for op in dispatch.ops():
        long, step = (torch.zeros(1, length, 1, 64, dtype=dtype, device=device) for length in (1024, 1))
        found[op] = {
            "auto": dispatch.choose(op, "auto", long),
            "auto_one_token": dispatch.choose(op, "auto", step),
            "refusals": dict(dispatch.explain(op, long)),
            "accuracy": {name: value._asdict() for name, value in known.get(op, {}).items()},
        }
    return found


def _describe_device(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        return {"name": "cpu", "kind": platform.processor() or platform.machine()}
    properties = torch.cuda.get_device_properties(device)
    capability = f"{properties.major}.{properties.minor}"
    return {
        "name": str(device), "kind": properties.name, "memory_bytes": properties.total_memory, "capability": capability,
    }  # fmt: skip
