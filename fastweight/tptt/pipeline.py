"""TPTT's pipeline: a text and what the model writes after it."""

from typing import Any

from transformers import GenerationConfig, TextGenerationPipeline


class TpttPipeline(TextGenerationPipeline):
    """`TpttPipeline(model=, tokenizer=, device=)(text, max_new_tokens=)` → [{"generated_text": text and continuation}].

    Greedy and 50 tokens unless the call says otherwise; every keyword of `generate` counts. A list of texts gives a
    list of such lists. device: as in transformers, -1 or None for the CPU, a number for a GPU.
    """

    _default_generation_config = GenerationConfig(max_new_tokens=50, do_sample=False)

    def __init__(self, model: Any, tokenizer: Any, device: Any = None, **kwargs: Any):
        super().__init__(model=model.eval(), tokenizer=tokenizer, device=device, **kwargs)
