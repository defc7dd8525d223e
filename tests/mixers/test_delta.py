"""The delta-rule mixer: its cases for the laws, and what only it promises."""

import torch

from fastweight.mixers.delta import Delta, DeltaConfig

CASES = {
    "delta": DeltaConfig(num_heads=2, head_dim=4),
    "gated": DeltaConfig(num_heads=2, head_dim=4, value_dim=6, gated=True),
    "induction": DeltaConfig(num_heads=2, head_dim=4, output_gate=False, init="induction"),
    "order2": DeltaConfig(
        num_heads=2, head_dim=4, gated=True, order=2, conv_width=0, output_gate=False, overshoot=True
    ),
}


def test_an_untrained_induction_memory_finds_what_followed_last_time():
    torch.manual_seed(0)
    mixer = Delta(32, DeltaConfig(num_heads=1, head_dim=32, init="induction", output_gate=False)).double()
    mixer.reset_parameters(0.3)
    letters = torch.randn(6, 32, dtype=torch.float64)
    text = [0, 1, 2, 3, 4, 5, 2]  # 2 was followed by 3
    x = letters[text][None]
    state = mixer.init_state(1)
    _, state = mixer.parallel(x[:, :-1], state)
    with torch.no_grad():
        (q, _, _, _, _), _ = mixer._project(x, mixer.init_state(1).conv, None)
        values = mixer._project(letters[[0, 1, 2, 3, 4, 5]][None], mixer.init_state(1).conv, None)[0][2][0, :, 0, 0]
        read = torch.einsum("kv,k->v", state.memory.memory[0, 0], q[0, -1, 0])
    assert torch.cosine_similarity(read[None], values).argmax() == 3


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


def test_the_statistics_follow_the_true_memory_for_several_writes_per_token():
    torch.manual_seed(0)
    mixer = Delta(16, DeltaConfig(num_heads=2, head_dim=4, gated=True, order=2)).double()
    mixer.reset_parameters(0.3)
    x, start = torch.randn(2, 9, 16, dtype=torch.float64), mixer.init_state(2)
    series = mixer.inner_losses(x, start)
    for t in range(9):
        # The oracle: the state that reading token by token really leaves, asked for the token's own pairs.
        _, after = mixer.parallel(x[:, : t + 1], start)
        (_, k, v, _, _), _ = mixer._project(x, start.conv, None)
        answer = torch.einsum("bhkv,bmhk->bmhv", after.memory.memory, k[:, t])
        torch.testing.assert_close(series["after"][t], (v[:, t] - answer).square().mean())
