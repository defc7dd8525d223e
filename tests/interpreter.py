"""Triton's interpreter on a machine without a GPU: its gaps closed, so that tests run the library's kernels on the CPU.

`interpreted(module, …)` prepares modules that define kernels. bfloat16 arithmetic is wrong in the interpreter (its
values are raw integers there): test in float32 or float16. The fixture `poisoned_empty` (conftest.py) fills what
torch.empty returns with NaN: what a kernel does not write shows.
"""

import contextlib
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


def _extent(t):
    """Elements from a tensor's first to its last."""
    return t.numel() and 1 + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))


@contextlib.contextmanager
def within_arguments():
    """Kernels raise here where they read or write a byte that belongs to none of their arguments."""
    import numpy as np
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    begin, ranges = GridExecutor._init_args_hst, []
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def note(self, args, kwargs):
        ranges[:] = [
            (t.data_ptr(), t.data_ptr() + _extent(t) * t.element_size(), t.element_size())
            for t in (*args, *kwargs.values())
            if hasattr(t, "data_ptr")
        ]
        return begin(self, args, kwargs)

    def check(pointers, mask):
        where = np.asarray(pointers.data).astype(np.int64)[np.asarray(mask.data).astype(bool)]
        outside = np.ones(where.shape, bool)
        for low, high, size in ranges:
            outside &= (where < low) | (where + size > high)
        assert not outside.any(), f"{outside.sum()} of {outside.size} addresses belong to none of the arguments"

    def checked_load(self, ptrs, mask, *rest):
        check(ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def checked_store(self, ptrs, value, mask, *rest):
        check(ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    patches = ((GridExecutor, "_init_args_hst", note), (InterpreterBuilder, "create_masked_load", checked_load))
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, value in (*patches, (InterpreterBuilder, "create_masked_store", checked_store)):
            patch.setattr(owner, name, value)
        yield
