"""Equal workers and a full quorum are synchronous DiLoCo, bit for bit; and it does not matter who was killed when."""

import pytest
import torch
from diloco_cases import Party, plain_diloco
from training_cases import attention_model, tiny_config, tiny_model

from fastweight.diloco import DilocoConfig, OuterConfig, merged_model
from fastweight.diloco.simulate import World, simulate


def equal_models(model, weights):
    return all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("make", [attention_model, tiny_model])
def test_equal_speeds_and_a_full_quorum_are_synchronous_diloco_bit_for_bit(store, make):
    train = tiny_config("x", steps=48)
    got = simulate(make(), store, train, DilocoConfig(lease_steps=4), World(speeds=(1.0,) * 4), measure=False)
    want = plain_diloco(make(), store, train, workers=4, lease_steps=4)
    assert got.merges == 3
    assert equal_models(got.model, want)


def test_unequal_speeds_with_a_full_quorum_change_the_time_and_not_one_bit(store):
    train, diloco = tiny_config("x", steps=48), DilocoConfig(lease_steps=4)
    even = simulate(attention_model(), store, train, diloco, World(speeds=(1.0,) * 4), measure=False)
    odd = simulate(attention_model(), store, train, diloco, World(), measure=False)
    assert equal_models(odd.model, dict(even.model.named_parameters()))
    assert (even.seconds, odd.seconds) == (pytest.approx(12 * 1.0), pytest.approx(12 * 3.33))


def test_one_worker_with_the_plain_mean_at_rate_one_is_training_alone(store):
    train = tiny_config("x", steps=12)
    outer = OuterConfig(kind="sgd", lr=1.0)
    got = simulate(
        attention_model(), store, train, DilocoConfig(lease_steps=4, outer=outer), World(speeds=(1.0,)), measure=False
    )
    want = plain_diloco(attention_model(), store, train, workers=1, lease_steps=12, lr=1.0, momentum=0.0)
    for name, p in got.model.named_parameters():
        torch.testing.assert_close(p, want[name], rtol=1e-5, atol=1e-6)


def test_two_fragments_that_nobody_waits_for_hold_all_parameters(store, folder):
    party = Party(folder, store, fragments=2)
    party.play()
    assert party.ledger.versions == [2, 2]
    before, after = attention_model(), merged_model(party.run, party.syncer.state)
    same = [name for name, p in after.named_parameters() if torch.equal(p, before.get_parameter(name))]
    assert same == []


def test_a_simulation_gives_the_same_bits_every_time(store):
    def once():
        diloco = DilocoConfig(
            lease_steps=3, quorum=2, grace_seconds=0.4, dylu=True, min_steps=1, up="int4", down="int8"
        )
        world = World(mbit_per_second=2.0)
        return simulate(attention_model(), store, tiny_config("x", steps=36), diloco, world)

    first, second = once(), once()
    assert first.to_dict() == second.to_dict()
    assert equal_models(first.model, dict(second.model.named_parameters()))
