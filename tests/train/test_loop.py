"""What a run does: learns, skips, warms up, carries, stops, reports."""

import json
import math
import os
import signal

import numpy as np
import pytest
import torch
from tolerances import OUTPUT, assert_close
from torch.nn import functional as F
from training_cases import call_at_forward, clock_of_steps, run_elsewhere, tiny_config, tiny_model

import fastweight
from fastweight import BlockConfig, Model, ModelConfig
from fastweight.data import Store, Windows
from fastweight.mixers.lact import LactConfig
from fastweight.mixers.ttt import TTTLinearConfig
from fastweight.train import DivergedError, InnerRateWarmup, LogConfig, ModelSource, read_metrics, train
from fastweight.train.source import read_ahead, step_batches


def losses(out):
    return [record["loss_nats"] for record in read_metrics(out, "train")]


def poison(model, numbers):
    """Make the features NaN in the forward passes `numbers`."""
    seen = iter(range(10**6))
    model.norm.register_forward_hook(lambda module, args, y: y * math.nan if next(seen) in numbers else y)
    return model


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_training_lowers_the_loss(store, tmp_path, name):
    config = tiny_config(store, name=name, lr=2e-2, steps=60)
    train(config, tmp_path, model=tiny_model(), quiet=True)
    # Uniform bytes cost ln 257 = 5.55 nats, the corpus's letter frequencies about 2.7.
    assert losses(tmp_path)[0] > 5.4
    assert losses(tmp_path)[-1] < 2.8


def test_the_first_loss_is_that_of_the_untrained_model_on_the_first_batch(store, tmp_path):
    train(tiny_config(store, steps=1, warmup_steps=0), tmp_path, model=tiny_model(), quiet=True)
    model = fastweight.load(tmp_path / "checkpoints" / "step-000000")
    from fastweight.data import loader

    batch = next(loader(Windows(Store.open(store).split("train"), 32), 4, seed=0))
    logits, _ = model(batch.tokens)
    nats = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum").item()
    (record,) = read_metrics(tmp_path, "train")
    assert record["loss_nats"] == pytest.approx(nats / int((batch.targets >= 0).sum()), rel=1e-6)
    assert record["bits_per_byte"] == pytest.approx(nats / math.log(2) / int(batch.target_bytes.sum()), rel=1e-6)


def test_the_final_model_is_the_one_the_run_ended_with(store, tmp_path):
    model = tiny_model()
    result = train(tiny_config(store), tmp_path, model=model, quiet=True)
    final = fastweight.load(result.model)
    for name, weight in model.state_dict().items():
        assert torch.equal(final.state_dict()[name], weight), name
    assert not torch.equal(final.embedding.weight, tiny_model().embedding.weight)


def test_the_tokenizer_travels_with_the_model(store, tmp_path):
    from fastweight.data import load_tokenizer

    result = train(tiny_config(store, steps=1, warmup_steps=0), tmp_path, model=tiny_model(), quiet=True)
    assert load_tokenizer(f"{result.model}/tokenizer").hash == Store.open(store).tokenizer.hash


def test_a_step_that_is_not_finite_is_skipped_and_counted(store, tmp_path):
    config = tiny_config(store, lr=1e-2, warmup_steps=0)
    model, weights = poison(tiny_model(), {3}), []
    model.embedding.register_forward_pre_hook(lambda module, args: weights.append(module.weight.detach().clone()))
    result = train(config, tmp_path, model=model, quiet=True)
    assert result.bad_steps == 1
    assert losses(tmp_path)[3] is None
    assert torch.equal(weights[3], weights[4])
    assert not torch.equal(weights[4], weights[5])


def test_bad_steps_in_a_row_end_the_run_and_name_the_last_good_checkpoint(store, tmp_path):
    config = tiny_config(store, max_bad_steps=3, checkpoint_every=2)
    with pytest.raises(DivergedError, match=r"3 steps in a row .* step-000006"):
        train(config, tmp_path, model=poison(tiny_model(), range(4, 100)), quiet=True)


def test_bad_steps_apart_do_not_end_the_run(store, tmp_path):
    config = tiny_config(store, max_bad_steps=2)
    assert train(config, tmp_path, model=poison(tiny_model(), {1, 3, 5, 7}), quiet=True).bad_steps == 4


def test_gradients_are_clipped_to_the_global_norm(store, tmp_path):
    """AdamW hides the size of gradients; plain momentum of one step does not: look at the gradients themselves."""
    norms, model = [], tiny_model()
    parameters = list(model.parameters())
    call_at_forward(model, 0, lambda: None)
    step = torch.optim.AdamW.step

    def watch(self, *args, **kwargs):
        norms.append(torch.stack([p.grad.square().sum() for p in parameters]).sum().sqrt().item())
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", watch)
        train(tiny_config(store, clip_norm=0.01), tmp_path, model=model, quiet=True)
    unclipped = [record["grad_norm"] for record in read_metrics(tmp_path, "train")]
    assert min(unclipped) > 0.1
    assert norms == pytest.approx([0.01] * 8, rel=1e-3)


def test_carried_state_makes_windows_of_a_document_one_sequence(store, tmp_path):
    """With a learning rate of practically zero, the losses must be those of whole documents read in one piece."""
    config = tiny_config(store, view="streams", carry_state=True, batch_size=2, lr=1e-30, steps=12, warmup_steps=0)
    train(config, tmp_path, model=tiny_model(torch.float64), quiet=True)
    split, model = Store.open(store).split("train"), tiny_model(torch.float64)
    rows = [[], []]
    from fastweight.train.source import step_batches

    batches = step_batches(split, config.data, config.seed, 0)
    for record in read_metrics(tmp_path, "train"):
        (batch,) = next(batches)
        nats = 0.0
        for b, row in enumerate(rows):
            if not batch.continues[b]:
                row.clear()
            row.append(batch.tokens[b])
            logits, _ = model(torch.cat(row)[None])
            nats += F.cross_entropy(logits[0, -32:], batch.targets[b], reduction="sum").item()
        assert record["loss_nats"] == pytest.approx(nats / batch.num_targets, rel=1e-9)
    assert max(map(len, rows)) > 1, "no document was carried, so nothing was tested"


def test_a_skipped_step_restarts_the_carried_memory(store, tmp_path):
    config = tiny_config(store, view="streams", carry_state=True, batch_size=2, steps=5)
    starts, model = [], tiny_model()
    init = model.init_state
    model.init_state = lambda n: starts.append(n) or init(n)
    train(config, tmp_path, model=poison(model, {2}), quiet=True)
    carried = [record["loss_nats"] for record in read_metrics(tmp_path, "train")]
    assert carried[2] is None
    assert all(loss is not None for loss in carried[3:])


def test_the_base_inner_rate_warms_up_linearly_and_ends_at_one(store, tmp_path):
    model, scales = tiny_model(), []
    model.blocks[0].mixer.inner_lr_scale = 1.0
    model.embedding.register_forward_pre_hook(lambda m, a: scales.append(model.blocks[0].mixer.inner_lr_scale))
    config = tiny_config(store, inner_rate=InnerRateWarmup(steps=4, first_ratio=0.2))
    train(config, tmp_path, model=model, quiet=True)
    # (init + min(1, (step - 1)/warmup)(peak - init))/peak with steps counted from 1 and init = 0.2 peak.
    assert scales == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 1.0])
    assert model.blocks[0].mixer.inner_lr_scale == 1.0


def test_an_inner_rate_that_nothing_reads_is_refused(store, tmp_path):
    with pytest.raises(ValueError, match="no layer of this model has a base inner learning rate"):
        train(tiny_config(store, inner_rate=InnerRateWarmup(steps=4)), tmp_path, model=tiny_model(), quiet=True)


def test_the_learning_rate_in_the_metrics_follows_the_schedule(store, tmp_path):
    train(tiny_config(store, lr=1e-3, final_ratio=0.0), tmp_path, model=tiny_model(), quiet=True)
    # Two steps up, then a line from 1 at step 2 to 0 at step 8.
    want = [0.5, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert [r["lr"] / 1e-3 for r in read_metrics(tmp_path, "train")] == pytest.approx(want)


def test_a_time_budget_ends_the_run_with_a_final_model(store, tmp_path, monkeypatch):
    clock_of_steps(monkeypatch, 0.125)
    config = tiny_config(store, steps=10**6, max_seconds=1.0, warmup_steps=0, final_ratio=0.0, lr=1e-3)
    result = train(config, tmp_path, model=tiny_model(), quiet=True)
    assert (result.stopped, result.step, result.seconds) == ("time", 8, 1.0)
    assert fastweight.load(result.model).num_parameters == result.parameters
    rates = [record["lr"] / 1e-3 for record in read_metrics(tmp_path, "train")]
    assert rates == pytest.approx([1 - n / 8 for n in range(8)]), "the decay follows the clock"


def test_sigterm_saves_after_the_step_and_says_so(store, tmp_path):
    model = call_at_forward(tiny_model(), 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    result = train(tiny_config(store), tmp_path, model=model, quiet=True)
    assert (result.stopped, result.step, result.exit_code, result.model) == ("SIGTERM", 4, 143, "")
    assert (tmp_path / "latest").read_text().strip() == "step-000004"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_heldout_loss_is_that_of_the_first_windows(store, tmp_path):
    config = tiny_config(store, heldout_every=8, heldout_tokens=5 * 32)
    result = train(config, tmp_path, model=tiny_model(), quiet=True)
    batch = Windows(Store.open(store).split("heldout"), 32).batch(np.arange(5))
    logits, _ = fastweight.load(result.model)(batch.tokens)
    nats = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum").item()
    assert result.heldout_nats == pytest.approx(nats / batch.num_targets, rel=1e-6)
    assert result.heldout_bits_per_byte == pytest.approx(nats / math.log(2) / batch.num_bytes, rel=1e-6)


def test_a_heldout_loss_that_is_not_finite_is_recorded_as_unknown(store, tmp_path):
    config = tiny_config(store, heldout_every=4, heldout_tokens=4 * 32)
    model = poison(tiny_model(), {4})
    train(config, tmp_path, model=model, quiet=True)
    first, second = read_metrics(tmp_path, "heldout")
    assert (first["loss_nats"], first["bits_per_byte"]) == (None, None)
    assert second["loss_nats"] > 0


def test_inner_statistics_are_those_of_the_layer_on_its_own_input(store, tmp_path):
    from fastweight.train.inner import inner_statistics

    model, split = tiny_model(), Store.open(store).split("train")
    batch = Windows(split, 32).batch(np.arange(2))
    first, second = inner_statistics(model, batch, max_tokens=24)
    assert (first["visit"], first["block"], first["mixer"], second["block"]) == (0, 0, "delta", 1)
    block = model.blocks[0]
    x = block.mixer_norm(model.embedding(batch.tokens[:1, :24]))
    want = block.mixer.inner_losses(x, block.mixer.init_state(1))
    for name, series in want.items():
        assert_close(torch.tensor(first["series"][name]), series.float(), OUTPUT[torch.float32], name)
        assert first["mean"][name] == pytest.approx(series.mean().item(), rel=1e-5)


def test_inner_statistics_are_written_as_often_as_asked(store, tmp_path):
    train(tiny_config(store, stats_every=4), tmp_path, model=tiny_model(), quiet=True)
    records = read_metrics(tmp_path, "inner")
    assert [record["step"] for record in records] == [4, 8]
    assert {"initial", "before", "after"} <= set(records[0]["layers"][1]["mean"])


def test_faults_of_the_inner_loop_are_counted_and_named(store, tmp_path, capsys):
    model = tiny_model()
    mixer, project = model.blocks[1].mixer, model.blocks[1].mixer._project

    def broken(x, tail, cu_seqlens):
        (q, k, v, beta, decay), tail = project(x, tail, cu_seqlens)
        v = v.clone()
        v[0, 5] = math.nan
        return (q, k, v, beta, decay), tail

    mixer._project = broken
    result = train(tiny_config(store, steps=2), tmp_path, model=model)
    assert result.fault_reports == 2
    assert "visit 1 (block 1, delta): 1 inner update(s) of sequence 0 were not finite" in capsys.readouterr().err


def test_a_fault_in_a_carried_memory_is_counted_once(store, tmp_path):
    model = tiny_model()
    mixer, calls = model.blocks[1].mixer, []
    project = mixer._project

    def broken_at_first(*args):
        (q, k, v, beta, decay), tail = project(*args)
        calls.append(1)
        v = v.index_fill(1, torch.tensor([3]), math.nan) if len(calls) == 1 else v
        return (q, k, v, beta, decay), tail

    mixer._project = broken_at_first
    config = tiny_config(store, view="streams", seq_len=16, carry_state=True)
    assert train(config, tmp_path, model=model, quiet=True).fault_reports == 4  # one in each row


def test_a_run_says_first_what_runs_and_leaves_stdout_alone(store, tmp_path, capsys):
    train(tiny_config(store, steps=2), tmp_path, model=tiny_model())
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[0].startswith("model: given in Python, 14,496 parameters,")
    assert "blocks: 2 × delta, on cpu (float32)" in lines[0]
    assert any(line.startswith("op delta_rule: chunked (fla needs CUDA tensors, got cpu") for line in lines)
    assert any(line.startswith("step 2/2  loss ") and "tokens/s" in line for line in lines)


def test_training_leaves_the_random_generator_of_the_caller_alone(store, tmp_path):
    torch.manual_seed(7)
    want = torch.rand(3)
    torch.manual_seed(7)
    train(tiny_config(store, steps=1, warmup_steps=0), tmp_path, model=tiny_model_without_seeding(), quiet=True)
    assert torch.equal(torch.rand(3), want)


def tiny_model_without_seeding():
    with torch.random.fork_rng():
        return tiny_model()


# Everything but the code generator, which needs a minute to compile even a tiny model.
COMPILED = """
compile = torch.nn.Module.compile
torch.nn.Module.compile = lambda self: compile(self, backend="aot_eager")
config = tiny_config(store, steps=3, warmup_steps=0, stats_every=3, compile=True)
train(config, out, model=tiny_model(), quiet=True)
print(torch._dynamo.utils.counters["stats"]["unique_graphs"])
"""


def test_compiled_blocks_train_to_the_same_losses(store, tmp_path):
    train(tiny_config(store, steps=3, warmup_steps=0), tmp_path / "plain", model=tiny_model(), quiet=True)
    done = run_elsewhere(COMPILED, tmp_path / "compiled", store)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0, "nothing was compiled"
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    assert read_metrics(tmp_path / "compiled", "inner")[0]["layers"]


# Twelve kinds of blocks, more than torch compiles for one function unless it is told to; past that it would raise here.
MANY_KINDS = """
import fastweight, torch._dynamo
from fastweight.layers import FEED_FORWARDS, FeedForwardConfig
from fastweight.mixers.attention import AttentionConfig
torch._dynamo.config.fail_on_recompile_limit_hit = True
compile = torch.nn.Module.compile
torch.nn.Module.compile = lambda self: compile(self, backend="eager")
blocks = tuple(
    fastweight.BlockConfig(
        mixer=AttentionConfig(num_heads=2), feed_forward=FeedForwardConfig(kind=kind, hidden=16), residual=residual
    )
    for kind in FEED_FORWARDS for residual in ("sequential", "parallel")
)
model = fastweight.Model(fastweight.ModelConfig(vocab_size=257, d_model=16, blocks=blocks))
train(tiny_config(store, steps=2, warmup_steps=0, before_after=True, compile=True), out, model=model, quiet=True)
print(len(blocks))
"""


def test_blocks_of_many_kinds_are_all_compiled(store, tmp_path):
    done = run_elsewhere(MANY_KINDS, tmp_path, store)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 8, "torch's own limit would have done"


SLOWLY_COMPILED = """
import json, time
spent = []
def slowly(graph, inputs):
    spent.append(time.sleep(0.2))
    return graph.forward
compile = torch.nn.Module.compile
torch.nn.Module.compile = lambda self: compile(self, backend=slowly)
result = train(tiny_config(store, steps=2, warmup_steps=0, compile=True), out, model=tiny_model(), quiet=True)
print(json.dumps([0.2 * len(spent), result.seconds]))
"""


def test_compiling_takes_no_training_time(store, tmp_path):
    done = run_elsewhere(SLOWLY_COMPILED, tmp_path, store)
    assert done.returncode == 0, done.stderr
    compiling, training = json.loads(done.stdout)
    assert compiling >= 0.4
    assert training < compiling


def test_steps_read_ahead_are_the_same_steps(store):
    train_split, config = Store.open(store).split("train"), tiny_config(store).data
    ahead = read_ahead(step_batches(train_split, config, seed=3, start_step=5))
    for _, got, want in zip(range(3), ahead, step_batches(train_split, config, seed=3, start_step=5), strict=False):
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(got, want, strict=True))


def test_what_reading_ahead_raises_is_raised_at_its_step():
    def failing():
        yield []
        raise OSError("the disk is gone")

    ahead = read_ahead(failing())
    assert next(ahead) == []
    with pytest.raises(OSError, match="the disk is gone"):
        next(ahead)


class TestBadInput:
    def test_a_device_that_does_not_exist_is_named(self, store, tmp_path):
        with pytest.raises(ValueError, match="unknown device 'gpu'"):
            train(tiny_config(store, device="gpu"), tmp_path, model=tiny_model())

    def test_a_vocabulary_that_is_too_small_is_refused(self, store, tmp_path):
        config = tiny_config(store, model=ModelSource(preset="tiny-delta", vocab_size=100))
        with pytest.raises(ValueError, match="vocabulary has 100 entries, tokenizer 'bytes' of the data needs 257"):
            train(config, tmp_path)

    def test_a_run_without_a_model_says_what_to_name(self, store, tmp_path):
        with pytest.raises(ValueError, match=r"name a preset \(model.preset\) or a model folder"):
            train(tiny_config(store), tmp_path)

    def test_heldout_text_that_fills_no_window_is_found_before_the_first_step(self, store, tmp_path):
        with pytest.raises(ValueError, match="heldout"):
            train(tiny_config(store, seq_len=6000, heldout_every=1), tmp_path, model=tiny_model())
        assert not (tmp_path / "metrics.jsonl").exists()

    def test_a_folder_that_holds_a_run_is_not_overwritten(self, store, tmp_path):
        config = tiny_config(store, steps=1, warmup_steps=0)
        train(config, tmp_path, model=tiny_model(), quiet=True)
        with pytest.raises(FileExistsError, match="already holds a run .*Resume it, or choose another folder"):
            train(config, tmp_path, model=tiny_model(), quiet=True)

    @pytest.mark.parametrize("go_on", [False, True])
    def test_a_model_that_lies_where_the_run_would_put_its_own_is_not_overwritten(self, store, tmp_path, go_on):
        tiny_model(seed=5).save(tmp_path / "model")
        config = tiny_config(store, steps=1, warmup_steps=0)
        with pytest.raises(FileExistsError, match="already holds model/ of something else.* Choose another folder"):
            train(config, tmp_path, model=tiny_model(), go_on=go_on, quiet=True)
        assert torch.equal(fastweight.load(tmp_path / "model").head.weight, tiny_model(seed=5).head.weight)


def test_a_run_can_start_from_the_weights_of_a_model_folder(store, tmp_path):
    tiny_model(seed=5).save(tmp_path / "start")
    config = tiny_config(store, model=ModelSource(folder=str(tmp_path / "start")), steps=1, warmup_steps=0)
    train(config, tmp_path / "run", quiet=True)
    first = fastweight.load(tmp_path / "run" / "checkpoints" / "step-000000")
    assert torch.equal(first.head.weight, tiny_model(seed=5).head.weight)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"] == first.config.to_dict()


@pytest.mark.parametrize("mixer", [
    LactConfig(num_heads=2, num_fast_heads=2, chunk_size=32, window=32),
    TTTLinearConfig(num_heads=2, mini_batch_size=32),
], ids=lambda mixer: mixer.kind)  # fmt: skip
def test_statistics_shorter_than_a_chunk_are_refused(store, tmp_path, mixer):
    model = Model(ModelConfig(vocab_size=257, d_model=16, blocks=(BlockConfig(mixer=mixer),)))
    config = tiny_config(store, log=LogConfig(stats_every=2, stats_tokens=31))
    with pytest.raises(ValueError, match=rf"block 0 \({mixer.kind}\) learns once per 32 tokens, statistics see"):
        train(config, tmp_path, model=model, quiet=True)
