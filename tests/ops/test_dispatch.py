"""What `auto` asks before it takes a backend is asked inside torch.compile too."""

import sys

import pytest
import torch

from fastweight import Mixer, Model
from fastweight.backends import explain_choice
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


def test_a_backend_that_no_op_has_is_named_with_near_ones_also_beside_a_layer_without_ops():
    class Opless(Mixer):
        ops = ()

    model = Model.from_preset("tiny-delta")
    model.blocks[0].mixer = Opless(8, None)  # type: ignore[union-attr]  # ModuleList is untyped
    with pytest.raises(ValueError, match=r"no op of this model has a backend 'chunkd'. Did you mean chunked\?"):
        model.set_backend("chunkd")


@pytest.mark.parametrize("op", dispatch.ops())
def test_what_a_backend_says_of_a_cpu_is_whole_sentences(op, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.zeros(1, 2, 1, 64)
    for name in set(dispatch.backends(op)) & set(dispatch.KERNELS):
        with pytest.raises(ValueError) as refusal:
            dispatch.choose(op, name, x)
        assert ".," not in str(refusal.value)
    assert ".;" not in explain_choice(op, x)
    assert ".)" not in explain_choice(op, x)
