"""The published runs of LaCT language models (Zhang et al. 2025, arXiv:2505.23884; repository a1600012888/LaCT).

The 760M settings are the command of the repository's README, run with flame; docs/training.md maps its flags one by
one. For 3B, the paper gives steps, batch and rates; its model differs from the published config file, so both are here.
"""

from fastweight.optim import OptimizerConfig, ScheduleConfig
from fastweight.recipes.registry import register
from fastweight.train import DataConfig, LogConfig, ModelSource, TrainConfig


def lact_run(preset: str, tokens_per_step: int, steps: int) -> TrainConfig:
    """AdamW 1e-3 with eps 1e-15, 1024 steps of warm-up, cosine to a tenth, windows of 32,768 tokens, bfloat16."""
    return TrainConfig(
        model=ModelSource(preset=preset, vocab_size=32000),
        data=DataConfig(seq_len=32768, batch_size=tokens_per_step // 32768, micro_batch_size=1),
        optimizer=OptimizerConfig(lr=1e-3, betas=(0.9, 0.95), eps=1e-15, weight_decay=0.1, decay_exclude=()),
        schedule=ScheduleConfig(kind="cosine", warmup_steps=1024, final_ratio=0.1),
        log=LogConfig(every=1, checkpoint_every=4096),
        steps=steps,
        clip_norm=1.0,
        seed=42,
        precision="bfloat16",
        activation_checkpointing=True,
        compile=True,
    )


@register("lact-760m-muon")
def lact_760m_muon() -> TrainConfig:
    """LaCT 760M, Muon inner updates: 40,960 steps of 2^20 tokens (42.9 B tokens)."""
    return lact_run("lact-760m-muon", 1 << 20, 40960)


@register("lact-760m-momentum")
def lact_760m_momentum() -> TrainConfig:
    """LaCT 760M, momentum inner updates: 40,960 steps of 2^20 tokens (42.9 B tokens)."""
    return lact_run("lact-760m-momentum", 1 << 20, 40960)


@register("lact-3b-muon")
def lact_3b_muon() -> TrainConfig:
    """LaCT 3B as in the published config file, Muon inner updates: 30,000 steps of 2^21 tokens (62.9 B tokens)."""
    return lact_run("lact-3b-muon", 1 << 21, 30000)


@register("lact-3b-paper-muon")
def lact_3b_paper_muon() -> TrainConfig:
    """LaCT 3B with the layers and window that the paper states: 30,000 steps of 2^21 tokens (62.9 B tokens)."""
    return lact_run("lact-3b-paper-muon", 1 << 21, 30000)
