"""Settings: what they refuse, and that JSON keeps them."""

import json

import pytest

from fastweight.presets import preset_names
from fastweight.recipes import recipe, recipe_names
from fastweight.recipes.ttt import ttt_run
from fastweight.train import DataConfig, ModelSource, TrainConfig

BAD = {
    "unknown key 'seq_lne'. Did you mean seq_len": {"data": {"seq_lne": 3}},
    "unknown key 'optimiser'. Did you mean optimizer": {"optimiser": {}},
    "unknown view 'window'. Did you mean windows": {"data": {"view": "window"}},
    "lr must be float, got str 'fast'": {"optimizer": {"lr": "fast"}},
    "steps must be int, got bool True": {"steps": True},
    "betas must be two numbers in [0, 1), got (0.9, 1.5)": {"optimizer": {"betas": [0.9, 1.5]}},
    "micro_batch_size must divide batch_size 8, got 3": {"data": {"micro_batch_size": 3}},
    'carry_state needs data.view "streams"': {"carry_state": True},
    "warm-up and decay take 1200 steps, the run has 1000": {"schedule": {"warmup_steps": 1200}},
    "compile and inner_rate.steps cannot go together": {"compile": True, "inner_rate": {"steps": 5}},
    "are both given; give one of them": {"model": {"preset": "tiny-delta", "folder": "there"}},
    "expected an object with keys, got list": {"log": []},
}


@pytest.mark.parametrize(("message", "data"), BAD.items(), ids=range(len(BAD)))
def test_bad_settings_are_refused_in_words(message, data):
    with pytest.raises(ValueError) as caught:
        TrainConfig.from_dict(data)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_survives_json_and_names_a_preset_that_exists(name):
    config = recipe(name)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.model.preset in preset_names()


def test_an_unknown_recipe_suggests_near_names():
    with pytest.raises(ValueError, match="unknown recipe 'ttt-linear-125'. Did you mean .*ttt-linear-125m"):
        recipe("ttt-linear-125")


# Sun et al. 2024 (arXiv:2407.04620), appendix C: tokens of each run in billions, and the peak rate.
TTT_TOKENS = {"125m": (2.5, 3e-3), "350m": (7, 1.5e-3), "760m": (15, 1.25e-3), "1.3b": (26, 1e-3)}


@pytest.mark.parametrize("family", ["ttt-linear", "ttt-mlp", "transformer"])
@pytest.mark.parametrize("size", TTT_TOKENS)
def test_the_ttt_recipes_read_the_published_number_of_tokens_at_the_published_rate(family, size):
    billions, lr = TTT_TOKENS[size]
    config = recipe(f"{family}-{size}")
    tokens = config.steps * config.data.batch_size * config.data.seq_len
    assert tokens / 1e9 == pytest.approx(billions, rel=0.02)
    assert config.optimizer.lr == lr
    assert config.optimizer.decay_exclude == ()
    assert config.inner_rate.steps == (config.schedule.warmup_steps if family == "ttt-mlp" else 0)


@pytest.mark.parametrize("seq_len", [1024, 2048, 8192, 32768])
def test_the_ttt_batch_keeps_half_a_million_tokens_per_step(seq_len):
    config = ttt_run("ttt-linear", "125m", seq_len)
    assert config.data.seq_len * config.data.batch_size == 524288
    assert config.data.batch_size % config.data.rows == 0


# Zhang et al. 2025 (arXiv:2505.23884) and the repository's README: tokens per step, steps.
@pytest.mark.parametrize(
    ("name", "tokens", "steps"),
    [
        ("lact-760m-muon", 1048576, 40960),
        ("lact-760m-momentum", 1048576, 40960),
        ("lact-3b-paper-muon", 2097152, 30000),
    ],
)
def test_the_lact_recipes_have_the_published_batch_and_length(name, tokens, steps):
    config = recipe(name)
    assert config.data.seq_len * config.data.batch_size == tokens
    assert (config.steps, config.schedule.warmup_steps, config.optimizer.eps) == (steps, 1024, 1e-15)


def test_rows_are_the_whole_batch_unless_a_micro_batch_is_asked_for():
    assert DataConfig(batch_size=6).rows == 6
    assert DataConfig(batch_size=6, micro_batch_size=2).rows == 2


def test_a_folder_takes_no_changes():
    with pytest.raises(ValueError, match="a model folder is taken as it is"):
        ModelSource(folder="there", changes={"tie_embeddings": True})


def test_views_with_settings_of_their_own_are_made_and_misplaced_settings_refused(tmp_path):
    from fastweight.data import Bins, LongDocuments, Store, prepare
    from fastweight.train.source import make_view

    (tmp_path / "a.txt").write_text("a long text " * 40)
    prepare(str(tmp_path / "a.txt"), "bytes", tmp_path / "store", heldout_fraction=0.0)
    split = Store.open(tmp_path / "store").split("train")
    bins = make_view(split, DataConfig(view="bins", seq_len=64, align=16), 0)
    assert isinstance(bins, Bins)
    assert bins.align == 16
    rows = make_view(split, DataConfig(view="long", seq_len=64, min_tokens=32), 0)
    assert isinstance(rows, LongDocuments)
    assert rows.min_tokens == 32
    for wrong in ({"align": 16}, {"view": "bins", "align": 7}, {"min_tokens": 8}, {"view": "long", "min_tokens": 65}):
        with pytest.raises(ValueError, match="data: (align|min_tokens) belongs to view"):
            DataConfig(seq_len=64, **wrong)
