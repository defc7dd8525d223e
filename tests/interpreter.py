"""Triton's interpreter on a machine without a GPU: its gaps closed, so that tests run the library's kernels on the CPU.

`interpreted(module, …)` prepares modules that define kernels. bfloat16 arithmetic is wrong in the interpreter (its
values are raw integers there): test in float32 or float16. The fixture `poisoned_empty` (conftest.py) fills what
torch.empty returns with NaN: what a kernel does not write shows.
"""

import importlib.util
import os

import pytest

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs triton and its interpreter (TRITON_INTERPRET=1); on a GPU the laws run the kernels: --device cuda",
)


def interpreted(*modules):
    """Let `range(tensor)` in the kernels of `modules` count in tensors, as compiled kernels do."""
    _keep_one_config()
    for module in modules:
        module.__dict__["range"] = _tensor_range


def _tensor_range(*bounds):
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    values = [
        int(b.handle.data.reshape(-1)[0]) if isinstance(b, tl.tensor) else int(getattr(b, "value", b)) for b in bounds
    ]
    for i in range(*values):
        if any(isinstance(b, tl.tensor) for b in bounds):
            yield tl.tensor(TensorHandle(np.array([i], np.int32), tl.int32), tl.int32)
        else:
            yield i


def _keep_one_config():
    """Without a GPU nothing can be timed: an autotuner's first configuration is taken."""
    from triton.runtime.autotuner import Autotuner

    if getattr(Autotuner, "_takes_the_first", False):
        return
    original = Autotuner.run

    def run(self, *args, **kwargs):
        self.configs = self.configs[:1]
        return original(self, *args, **kwargs)

    Autotuner.run = run
    Autotuner._takes_the_first = True
