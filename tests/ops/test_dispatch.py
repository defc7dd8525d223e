"""What `auto` asks before it takes a backend is asked inside torch.compile too."""

import sys

import pytest
import torch

import fastweight.model  # noqa: F401  # all ops register themselves
from fastweight.ops import dispatch
from fastweight.ops.delta import fla


class OnAGpu:
    """What refusals look at where there is no call yet, of queries that live on an H100."""

    device, dtype, shape, is_cuda = torch.device("cuda"), torch.bfloat16, torch.Size((1, 128, 2, 64)), True

    def dim(self):
        return len(self.shape)


@pytest.mark.parametrize("op", dispatch.ops())
def test_the_compiler_follows_what_is_asked_on_a_gpu_without_a_warning(op, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (9, 0))
    monkeypatch.setattr("torch._dynamo.utils.warn_once_cache", set())  # it says nothing twice
    queries = OnAGpu()
    # A warning is an error here, as everywhere in these tests.
    ask = torch.compile(lambda x: (x, dispatch.explain(op, queries)), backend="eager", fullgraph=True)
    assert ask(torch.zeros(1))[1] == dispatch.explain(op, queries)


@pytest.mark.parametrize(("there", "found"), [([], False), (["fla"], False), (["fla", "fla/ops"], True)])
def test_a_package_of_kernels_is_found_without_being_imported(there, found, tmp_path, monkeypatch):
    for folder in there:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.delitem(sys.modules, "fla", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert fla.installed() == found
