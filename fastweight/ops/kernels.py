"""What every Triton backend asks first: can kernels run on these tensors at all?"""

import importlib.util
import os

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU; decided before the first kernel is defined."""
    return os.environ.get("TRITON_INTERPRET") == "1"


HAS_TRITON = importlib.util.find_spec("triton") is not None  # imported only when a kernel is about to run


def why_no_kernels(x: Tensor, way_out: str = 'Use backend="chunked"') -> str | None:
    """Why kernels cannot run on inputs like `x` (device, dtype, package), or None if they can."""
    if not x.is_cuda and not interpreting():
        return f'needs CUDA tensors, got {x.device.type}. {way_out}, or move the model with model.to("cuda").'
    if not HAS_TRITON:
        return f"needs the package triton. {way_out}, or install it: pip install triton."
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
        return f"needs a GPU of compute capability 8.0 or newer, got {torch.cuda.get_device_name(x.device)}. {way_out}."
    if x.dtype not in KERNEL_DTYPES:
        return f"computes in float32, float16 or bfloat16, got {x.dtype}. {way_out}."
    return None
