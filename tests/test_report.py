"""The report of several models: its figures, its verdict (a no included), and that nothing is measured twice."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from tiny_models import delta_config, tiny_model

from fastweight.data import ByteTokenizer
from fastweight.layers import FeedForwardConfig
from fastweight.mixers.attention import AttentionConfig
from fastweight.model import BlockConfig, Model, ModelConfig
from fastweight.presets import preset
from fastweight.report import Report, ReportSettings, compare, measure, window_of_same_memory, with_window
from fastweight.report.parts import FOLDER, Parts, model_fingerprint
from fastweight.report.verdict import growth, judge

BYTES = ByteTokenizer()
SETTINGS = ReportSettings(
    lengths=(20, 60), tail_tokens=10, documents=4, divergence_tokens=30, passkey_lengths=(210,), passkey_trials=1,
    passkey_choices=3, pairs=(4,), pair_trials=6, speed_lengths=(24, 40), prefill_tokens=8, decode_tokens=1, repeats=2,
    batch_size=3, piece_tokens=32, device="cpu",
)  # fmt: skip


def documents(count=6, length=60):
    rng = np.random.default_rng(0)
    return [(rng.integers(0, 257, length + 1), np.append(0, np.ones(length, np.int64))) for _ in range(count)]


def attention_model(window=None, **changes):
    torch.manual_seed(3)
    mixer = AttentionConfig(num_heads=2, window=window)
    config = {"d_model": 16, "blocks": (BlockConfig(mixer=mixer, feed_forward=FeedForwardConfig(hidden=8)),)}
    return Model(ModelConfig(vocab_size=257, init_std=0.3, **config | changes))


def make(models, folder=None, **changes):
    options = {"backbone": "backbone", "tokenizer": BYTES, "documents": documents(), "settings": SETTINGS}
    return compare(models, folder=folder, quiet=True, **options | changes)


def three():
    backbone = attention_model()
    return {"backbone": backbone, "memory": tiny_model(), "window": with_window(backbone, 10)}


@pytest.fixture(autouse=True)
def _no_picture(request, monkeypatch):
    """Drawing takes most of the time of a small report; one test looks at the picture."""
    if "picture" not in request.node.name:
        monkeypatch.setattr("fastweight.report.picture.draw", lambda *_: None)


@pytest.fixture(scope="module")
def report():
    torch.manual_seed(0)
    return make(three())


def without_times(report):
    """The JSON form, but for what a clock says."""
    data = json.loads(json.dumps(report.to_dict()))
    for figures in data["models"].values():
        for row in figures["speed"]:
            for name in [name for name in row if "second" in name]:
                del row[name]
    data["verdict"] = [claim for claim in data["verdict"] if claim["topic"] != "speed"]
    return data


def test_every_model_has_every_figure(report):
    for figures in report.models.values():
        assert [row["length"] for row in figures["lengths"]] == [20, 60]
        assert [row["length"] for row in figures["speed"]] == [24, 40]
        assert [row["tokens"] for row in figures["passkey"]] == [210]
        assert [row["size"] for row in figures["pairs"]] == [4]
    assert report.documents == {"used": 4, "found": 6, "offered": 6, "tokens": 60}


def test_the_backbone_has_no_divergence_and_the_others_have(report):
    assert report.models["backbone"]["divergence"] is None
    assert report.models["memory"]["divergence"]["mean"] > 0
    assert report.models["memory"]["divergence"]["tokens"] == 30


def test_a_report_survives_saving_and_loading(report, tmp_path):
    report.save(tmp_path)
    loaded = Report.load(tmp_path)
    assert loaded == report
    assert list(loaded.models) == list(report.models)
    assert Report.from_dict(report.to_dict()) == report


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"verdict": []}, "its verdict is no list of claims, the conclusion first"),
        ({"verdict": {"text": "a"}}, "its verdict is no list of claims"),
        ({"verdict": ["it helps"]}, "claim 0 of its verdict is not topic, against, outcome, text"),
        ({"verdict": [{"topic": "conclusion", "against": "", "outcome": "better"}]}, "claim 0 of its verdict.*text"),
        ({"verdict": [{"topic": "help", "against": "", "outcome": "better", "text": 3}]}, "each a text"),
        ({"models": {}}, "it has no figures of 'backbone', which it names"),
        ({"converted": "another"}, "it has no figures of 'another'"),
        ({"documents": {}}, r"its figures are damaged \(KeyError: 'used'\)"),
    ],
)
def test_a_damaged_report_is_refused_with_what_is_wrong(report, tmp_path, change, said):
    (tmp_path / "report.json").write_text(json.dumps(report.to_dict() | change))
    with pytest.raises(ValueError, match=rf"report.json: .*{said}.*Make the report again"):
        Report.load(tmp_path)


def test_the_folder_holds_a_table_and_a_picture(report, tmp_path):
    report.save(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert report.verdict[0]["text"] in text
    assert f"| memory | {report.models['memory']['lengths'][0]['perplexity']:.4g} (" in text
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_of_the_terminal_shows_every_model_and_the_verdict(report):
    from rich.console import Console

    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(report.table())
    shown = console.export_text()
    assert report.verdict[0]["text"] in shown
    assert all(name in shown for name in report.models)
    console.file.close()


def test_identical_models_make_a_verdict_that_says_no():
    model = tiny_model()
    found = make({"backbone": model, "memory": model, "control": model})
    assert found.verdict[0]["text"].startswith("The memory does not help")
    assert not found.helps
    assert found.models["memory"]["divergence"]["nats"] == [0.0] * 4
    topics = ("help", "cost", "passkey", "pairs", "bytes")
    assert {claim["outcome"] for claim in found.verdict if claim["topic"] in topics} == {"same"}


def figures(nats, *, right=6, size=100, speed=10.0):
    """Plain figures of a model with these losses of each document's last tokens (of 10 tokens)."""
    row = {"length": 80, "tail": 10, "nats": nats, "tail_nats": nats, "state_bytes": size}
    row["perplexity"] = row["tail_perplexity"] = math.exp(sum(nats) / len(nats) / 10)
    recall = {"tokens": 80, "size": 4, "chance": 0.25, "exact": [i < right for i in range(8)]}
    rates = {"length": 100, "state_bytes": size, "decode_tokens_per_second": [speed - 1, speed, speed + 1]}
    return {
        "lengths": [row], "divergence": {"mean": 0.1, "mean_agreement": 0.9}, "passkey": [recall],
        "pairs": [recall | {"picked": recall["exact"]}], "speed": [rates], "faults": [],
    }  # fmt: skip


NOISY = [10.0, 12.0, 9.0, 11.0]
NO = "The memory does not help: its loss on long texts is not lower than that of control."


@pytest.mark.parametrize(("shift", "outcome", "words"), [
    ([-1.0, -1.1, -0.9, -1.0], "better", "The memory helps: its loss on long texts is lower than that of control."),
    ([1.0, 1.1, 0.9, 1.0], "worse", NO),
    ([-1.0, 1.1, 0.9, -1.1], "same", NO),
])  # fmt: skip
def test_the_verdict_follows_the_difference_and_its_noise(shift, outcome, words):
    mine = figures([a + b for a, b in zip(NOISY, shift, strict=True)])
    found = judge({"backbone": figures(NOISY), "memory": mine, "control": figures(NOISY)}, "backbone", "memory")
    assert found[0]["outcome"] == outcome
    assert found[0]["text"].startswith(words)


def test_a_memory_that_beats_one_control_of_two_helps_in_part():
    better, worse = ([x + d for x in NOISY] for d in (1, -1))
    models = {"backbone": figures(NOISY), "memory": figures(NOISY), "good": figures(worse), "bad": figures(better)}
    text = judge(models, "backbone", "memory")[0]["text"]
    assert text == "The memory helps in part: its loss on long texts is lower than that of bad, not of good."


def test_one_document_is_no_verdict():
    models = {"backbone": figures([10.0]), "memory": figures([1.0])}
    assert judge(models, "backbone", "memory")[0]["outcome"] == "unknown"


def test_claims_state_their_figures():
    models = {"backbone": figures(NOISY, size=1000, speed=5.0), "memory": figures([x - 1 for x in NOISY], right=7)}
    texts = [claim["text"] for claim in judge(models, "backbone", "memory")]
    assert any(
        "in the last 10 of 80 tokens perplexity 2.586 against 2.858 of backbone (-9.52 %; -0.1000 ± 0.0000" in text
        for text in texts
    )
    assert "recalls no more than backbone: 7 of 8 number(s) hidden in 80 tokens against 6" in texts
    assert (
        "its memory is constant, 100 bytes per request at 80 and at 100 tokens; backbone's is constant, 1,000"
        in str(texts)
    )
    assert any(text.startswith("decoding at 100 tokens is faster: 10 tokens/s") for text in texts)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({512: 5, 1024: 9, 8192: 9}, "is constant from 1,024 tokens on, 9 bytes per request up to 8,192"),
        ({512: 5, 1024: 9, 8192: 10}, "grows, 5 bytes per request at 512 tokens and 10 at 8,192"),
    ],
)
def test_a_state_that_fills_a_window_grows_no_further(sizes, words):
    assert growth(sizes) == words


def test_more_recall_is_claimed_only_beyond_chance():
    def outcome(mine, theirs):
        models = {"backbone": figures(NOISY, right=theirs), "memory": figures(NOISY, right=mine)}
        return next(c["outcome"] for c in judge(models, "backbone", "memory") if c["topic"] == "passkey")

    # Six of six differing prompts: p = 2/64; five of five: 2/32.
    assert [outcome(7, 1), outcome(1, 7), outcome(6, 1), outcome(4, 4)] == ["better", "worse", "same", "same"]


def test_faults_of_a_memory_are_told():
    mine = figures(NOISY) | {"faults": ["visit 0: ..."]}
    found = judge({"backbone": figures(NOISY), "memory": mine}, "backbone", "memory")
    assert found[-1]["text"] == "memory: 1 fault(s) of its memory, the first: visit 0: ..."


def test_an_interrupted_report_goes_on_and_equals_one_that_was_not(tmp_path):
    models = three()

    def dies():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(models | {"window": dies}, tmp_path)
    assert not (tmp_path / "report.json").exists()
    assert without_times(make(models, tmp_path)) == without_times(make(models))


def test_what_was_measured_is_not_measured_again(tmp_path, monkeypatch):
    first = make(three(), tmp_path)
    for name in ("score_lengths", "divergence", "ask", "measure_speed"):
        monkeypatch.setattr(measure, name, None)  # calling it would fail
    assert make(three(), tmp_path) == first


@pytest.mark.parametrize("change", ["weights", "settings", "frozen", "documents"])
def test_other_weights_settings_or_texts_are_measured_anew(change, tmp_path):
    make(three(), tmp_path)
    models, options = three(), {}
    if change == "weights":
        models["memory"].embedding.weight.data[-1, -1] += 1
    elif change == "frozen":
        for mixer in models["memory"].mixers():
            mixer.learning = False
    elif change == "settings":
        options["settings"] = dataclasses.replace(SETTINGS, tail_tokens=11)
    else:
        options["documents"] = documents()[1:]
    assert without_times(make(models, tmp_path, **options)) == without_times(make(models, **options))


def test_a_damaged_part_is_refused_by_name(tmp_path):
    parts = Parts(tmp_path)
    parts.get("lengths", {"model": "a"}, lambda: 1)
    (file,) = (tmp_path / FOLDER).iterdir()
    file.write_text('{"key": {}')
    with pytest.raises(ValueError, match=r"lengths-.*\.json is damaged .* Remove it"):
        parts.get("lengths", {"model": "a"}, lambda: 1)


def test_models_are_loaded_one_at_a_time_beside_the_backbone():
    import weakref

    alive, most = [], []

    def load():
        model = tiny_model(seed=len(alive))
        alive.append(weakref.ref(model))
        most.append(sum(ref() is not None for ref in alive))
        return model

    make({"first": load, "backbone": load, "second": load, "third": load})
    assert most == [1, 2, 2, 2]


def test_a_model_that_was_given_stays_as_it_was():
    models = three()
    models["memory"].train()
    models["memory"].blocks[0].eval()
    before = {name: model_fingerprint(model) for name, model in models.items()}
    make(models)
    assert [block.training for block in models["memory"].blocks] == [False, True]
    assert before == {name: model_fingerprint(model) for name, model in models.items()}


@pytest.mark.parametrize(("changes", "message"), [
    ({"models": {"backbone": None}}, "needs the backbone and at least one other model"),
    ({"backbone": "bakbone"}, "no model 'bakbone' .* Did you mean backbone"),
    ({"converted": "mem"}, "no model 'mem' .*Did you mean memory"),
    ({"converted": "backbone"}, "'backbone' is the backbone"),
    ({"documents": documents(2, 30)}, "none of the 2 documents has 60 tokens; the longest has 30"),
    ({"documents": [(ids + 1, num_bytes) for ids, num_bytes in documents()]},
     "the documents hold token ids up to 257, the tokenizer bytes has 257"),
    ({"models": {"backbone": tiny_model, "memory": dict}}, "'memory' loads a dict; needs a fastweight Model"),
    ({"models": {"backbone": tiny_model, "memory": lambda: tiny_model(vocab_size=200)}},
     "'memory' has 200 token ids, the tokenizer bytes has 257"),
    ({"models": {"backbone": lambda: attention_model(max_positions=64), "memory": tiny_model}},
     "'backbone' has positions for 64 tokens, and the settings read up to 226"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        make(changes.pop("models", three()), **changes)


@pytest.mark.parametrize(("changes", "message"), [
    ({"lengths": ()}, "lengths is empty"),
    ({"lengths": (5, 5)}, "lengths must be positive and grow"),
    ({"repeats": 0}, "repeats must be at least 1, got 0"),
    ({"speed_lengths": (512,)}, "speed_lengths must exceed prefill_tokens 512"),
    ({"documents": 2.5}, "documents must be int"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ReportSettings(**changes)


def test_the_tokens_of_a_report_are_those_that_a_model_reads(monkeypatch):
    """Counted at the models."""
    read, features = [], Model.features
    monkeypatch.setattr(
        Model, "features", lambda self, tokens, *rest: read.append(tokens.numel()) or features(self, tokens, *rest)
    )
    models = {"backbone": tiny_model(seed=0), "memory": tiny_model(seed=1)}
    make(models)
    per_model = SETTINGS.tokens_per_model
    # What the settings do not know: 3 prompts of 3 choices, each 6 bytes with the space, the last of them unread.
    answers = 3 * 3 * 5
    # The backbone does not diverge from itself: 4 documents of 30 tokens, twice.
    assert sum(read) == 2 * (per_model + answers) - 4 * 30 * 2


def test_parts_that_are_not_wanted_are_left_out(tmp_path):
    settings = ReportSettings(lengths=(20,), passkey_lengths=(), pairs=(), speed_lengths=(), device="cpu")
    found = make(three(), tmp_path, settings=settings)
    assert {claim["topic"] for claim in found.verdict} == {"conclusion", "help", "divergence", "bytes"}


@pytest.mark.parametrize(("content", "message"), [
    ("{", "Make the report again"),
    ("[]", "not a fastweight-report"),
    ('{"format": "fastweight-report", "version": 9}', "version 9, this library reads 1"),
    ('{"format": "fastweight-report", "version": 1}', "missing key"),
])  # fmt: skip
def test_a_file_that_is_no_report_is_refused(content, message, tmp_path):
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        Report.load(tmp_path)


def test_a_folder_without_a_report_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="written by report.compare"):
        Report.load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_sinks", "num_bytes"), [(0, 47_312), (4, 47_312), (4, 47_311), (1, 9_999)])
def test_the_window_of_the_same_memory_is_the_largest_that_fits(num_sinks, num_bytes, dtype):
    """A state that has read far more than the window, against one of a window of one token more."""
    config = preset("tiny-attention")
    window = window_of_same_memory(config, num_bytes, num_sinks, dtype=dtype)
    model = Model(config).to(dtype)

    def taken(window):
        with torch.no_grad():
            return with_window(model, window, num_sinks)(torch.zeros(1, 200, dtype=torch.int64))[1].num_bytes

    assert taken(window) <= num_bytes < taken(window + 1)


def test_a_memory_smaller_than_the_sinks_has_no_window():
    with pytest.raises(ValueError, match=r"even a window of 1 token and 4 sinks takes 9,\d+ bytes, more than 5,000"):
        window_of_same_memory(preset("tiny-attention"), 5000)


def test_a_model_without_attention_gets_no_window():
    with pytest.raises(ValueError, match="no block is of kind 'attention'"):
        with_window(tiny_model(), 8)


@torch.no_grad()
def test_a_window_keeps_the_weights_and_what_lies_within_it():
    model = attention_model()
    changed = with_window(model, 16, 2)
    tokens = torch.from_numpy(documents(1, 40)[0][0])[None]
    want, got = model(tokens)[0], changed(tokens)[0]
    assert torch.equal(got[:, :16], want[:, :16])
    assert not torch.allclose(got[:, 30:], want[:, 30:], rtol=1e-3)
    assert changed.embedding.weight.data_ptr() == model.embedding.weight.data_ptr()


def test_a_block_that_sees_less_than_the_window_keeps_its_own():
    blocks = tuple(BlockConfig(mixer=AttentionConfig(num_heads=2, window=w)) for w in (None, 5, 50))
    blocks += (BlockConfig(mixer=delta_config()),)
    changed = with_window(Model(ModelConfig(vocab_size=9, d_model=8, blocks=blocks)), 20, 3).config.blocks
    assert [(b.mixer.window, b.mixer.num_sinks) for b in changed[:3]] == [(20, 3), (5, 0), (20, 3)]
    assert changed[3] == blocks[3]


@pytest.mark.parametrize(("device", "dtype"), [
    ("cpu", torch.bfloat16),
    pytest.param("cuda", torch.float32, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
    pytest.param("cuda", torch.bfloat16, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
])  # fmt: skip
def test_a_report_says_where_and_in_what_precision_the_models_ran(device, dtype):
    models = {name: model.to(dtype) for name, model in three().items()}
    found = make(models, settings=dataclasses.replace(SETTINGS, device=device))
    ran = {(f["machine"]["device"].partition(":")[0], f["machine"]["dtype"]) for f in found.models.values()}
    assert ran == {(device, str(dtype).removeprefix("torch."))}
    assert {model.device.type for model in models.values()} == {"cpu"}


def test_models_that_differ_in_their_order_alone_have_figures_of_their_own(tmp_path):
    one, other = (attention_model() for _ in range(2))
    other.load_state_dict(one.state_dict())
    other.set_order((0, 0))
    assert model_fingerprint(one) != model_fingerprint(other)
    assert with_window(other, 5).visits == other.visits
