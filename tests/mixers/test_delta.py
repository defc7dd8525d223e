"""The delta-rule mixer: its cases for the laws, and what only it promises."""

import torch

from fastweight.mixers.delta import Delta, DeltaConfig

CASES = {
    "delta": DeltaConfig(num_heads=2, head_dim=4),
    "gated": DeltaConfig(num_heads=2, head_dim=4, value_dim=6, gated=True),
    "order2": DeltaConfig(
        num_heads=2, head_dim=4, gated=True, order=2, conv_width=0, output_gate=False, overshoot=True
    ),
}


def test_unknown_settings_are_refused_by_name():
    import pytest

    with pytest.raises(ValueError, match="order must be at least 1"):
        DeltaConfig(num_heads=1, head_dim=4, order=0)


def test_recall_error_shrinks_after_each_write():
    torch.manual_seed(0)
    mixer = Delta(16, DeltaConfig(num_heads=2, head_dim=4)).double()
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    series = mixer.inner_losses(x, mixer.init_state(2))
    # The write is strength beta in (0, 1) along a unit key: the error after is (1 - beta) times the error before.
    assert (series["after"] < series["before"]).all()
    assert torch.equal(series["initial"][0], series["before"][0])
