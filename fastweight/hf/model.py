"""Any model of the library as a PreTrainedModel that generates."""

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from fastweight.configs import require
from fastweight.hf import padding
from fastweight.hf.cache import FastweightCache, can_crop
from fastweight.hf.config import FastweightConfig
from fastweight.model import Model
from fastweight.ops.sequences import check_cu_seqlens


class FastweightForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model over `Model`; `self.model` is that model, with its own weights and names.

    Padding may stand anywhere and is never read. The state of each sequence travels as `past_key_values`.
    """

    config_class = FastweightConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _supports_sdpa = True  # "eager" or "sdpa": either way the library's own attention, which honours every mask

    def __init__(self, config: FastweightConfig):
        super().__init__(config)
        self.model = _build(config)
        self.model.origin = config.origin
        self.gradient_checkpointing = False
        self.post_init()

    @classmethod
    def from_model(cls, model: Model) -> "FastweightForCausalLM":
        """The face of `model`: the same weights, not a copy."""
        config = FastweightConfig(model.config, dtype=model.embedding.weight.dtype, origin=model.origin)
        with torch.device("meta"):
            face = cls(config)
        face.model = model
        face.gradient_checkpointing = model.checkpointing
        return face.train(model.training)

    def to_model(self) -> Model:
        """The library's model behind this face: the same weights, not a copy."""
        return self.model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Write safetensors, config.json with the model's origin, and the file that `auto_map` names."""
        self.config.describe(self.model)
        super().save_pretrained(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a folder that `save_pretrained` wrote; keywords as in PreTrainedModel.from_pretrained.

        Raises ValueError where a tensor is missing, unexpected or misshapen: a part of the model would be random.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        base: Any = super()
        model, info = base.from_pretrained(*args, output_loading_info=True, **kwargs)
        wrong = {
            key: sorted(map(str, info.get(key) or ())) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
        }
        found = [f"{key.replace('_', ' ')}: {', '.join(names[:8])}" for key, names in wrong.items() if names]
        require(not found, f"{args[0] if args else 'the checkpoint'} does not fit this model; {'; '.join(found)}.")
        with torch.device("meta"):
            fresh = cls(model.config)
        for name, parameter in fresh.named_parameters():  # transformers makes every loaded tensor trainable
            model.get_parameter(name).requires_grad_(parameter.requires_grad)
        return (model, info) if wants_info else model

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModelForCausalLM") -> None:
        """Nothing to do: every folder carries the same `auto_map`, and this library's code is never copied into it."""

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing to do: `Model` draws its own weights, and from_pretrained refuses missing ones."""

    @property
    def _is_stateful(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]  # asked of instances only
        """The state cannot be rolled back, so assisted decoding is refused."""
        return not can_crop(self.model.config)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding; its shape may differ only through `resize_token_embeddings`."""
        self.model.embedding = value  # pyright: ignore[reportAttributeAccessIssue]

    def get_output_embeddings(self) -> nn.Module:
        """The head; with tied embeddings the embedding itself."""
        return self.model.embedding if self.model.head is None else self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        if self.model.head is None:
            self.set_input_embeddings(new_embeddings)
        else:
            self.model.head = new_embeddings  # pyright: ignore[reportAttributeAccessIssue]

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """Resize embedding and head, and the configs with them; states of the old size no longer fit.

        New rows are as transformers draws them, or, without its mean_resizing, as this library draws weights."""
        old = self.model.embedding.weight.shape[0]
        embedding = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if not (args[1] if len(args) > 1 else kwargs.get("mean_resizing", True)):
            self._draw_rows(old)
        config = replace(self.model.config, vocab_size=embedding.weight.shape[0])
        self.model.config, self.model.signature = config, config.signature
        self.config.set_model(config)
        return embedding

    @torch.no_grad()
    def _draw_rows(self, first: int) -> None:
        """New weights for the tokens from `first` on."""
        config = self.model.config
        self.model.embedding.weight[first:].normal_(std=config.std_of_embedding)
        if self.model.head is not None:
            self.model.head.weight[first:].normal_(std=config.init_std)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether blocks are checkpointed. PEFT asks by this name, of which newer transformers warn."""
        return self.gradient_checkpointing

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, every_n_layers: int = 1
    ) -> None:
        """Checkpoint every block, as the library does: non-reentrant, recomputed with the memory as it was."""
        plain = isinstance(gradient_checkpointing_func, functools.partial)
        options = gradient_checkpointing_func.keywords if plain else {}
        function = gradient_checkpointing_func.func if plain else gradient_checkpointing_func
        other = {k: v for k, v in options.items() if (k, v) != ("use_reentrant", False)}
        require(
            not enable or (function is checkpoint and not other and every_n_layers == 1),
            f"gradient checkpointing: blocks are checkpointed one by one, use_reentrant=False and nothing else; got "
            f"{options}, every_n_layers={every_n_layers}, function {function}. Leave these settings out.",
        )
        self.gradient_checkpointing = self.model.checkpointing = enable

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> Any:
        """Every `generate` has a state of its own, unless the caller hands one in."""
        kind = generation_config.cache_implementation
        require(
            kind is None,
            f"generate: cache_implementation {kind!r} does not fit; the state is this model's only cache.",
        )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = FastweightCache()
            return None
        base: Any = super()
        return base._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, is_first_iteration: bool = False, **kwargs: Any
    ) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]  # fewer names: inputs_embeds is refused by generate
        """As in GenerationMixin, but later positions are left to the state: counted from padding they err."""
        base: Any = super()
        inputs = base.prepare_inputs_for_generation(input_ids, *args, is_first_iteration=is_first_iteration, **kwargs)
        if not is_first_iteration:
            inputs.pop("position_ids", None)
        return inputs

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: FastweightCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
    ) -> Any:
        """Logits [B, T or logits_to_keep, vocab_size], with `labels` the loss, and the cache.

        input_ids: [B, T], or packed [1, total] with cu_seqlens [N + 1] (or with position_ids that start again at 0).
        cu_seq_lens_q and so on: the same as transformers' collators name it for FlashAttention; lengths follow from it.
        attention_mask: [B, T] or [B, past + T], 0 for padding, anywhere; the logits at padding are those of the token
        before it. position_ids: only checked, the state counts by itself. past_key_values: moved forward by this call.
        labels: [B, T], shifted inside, -100 ignored, as are padding and the first token of a sequence.
        logits_to_keep: the last n columns (0: all) or their numbers. num_items_in_batch: divides the summed loss, the
        mean is taken without it. Raises ValueError for inputs_embeds, output_attentions and output_hidden_states.
        """
        self._check_call(input_ids, inputs_embeds, output_attentions, output_hidden_states, labels, logits_to_keep)
        assert input_ids is not None
        cu_seqlens = _offsets(cu_seqlens, cu_seq_lens_q, cu_seq_lens_k)
        if use_cache is None:
            use_cache = past_key_values is not None or (self.config.use_cache and not self.training)
        cache = FastweightCache() if past_key_values is None else past_key_values
        cache = cache if use_cache else cache.fork()
        mask, cu_seqlens = _layout(input_ids, attention_mask, position_ids, cu_seqlens, cache)
        features = self._read(input_ids, mask, cu_seqlens, cache)
        logits = self.model.logits(_keep(features, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=padding.own_labels(labels, mask, cu_seqlens),
                vocab_size=self.model.config.vocab_size, num_items_in_batch=num_items_in_batch,
            )  # fmt: skip
        held: Any = cache if use_cache else None  # typed as a Cache of layers there
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=held)
        return output.to_tuple() if return_dict is False else output

    def _read(self, ids: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, cache: FastweightCache) -> Tensor:
        """Features [B, T, D] of ids; moves the cache forward."""
        if mask is None:
            features, state = self.model.features(ids, cache.state, cu_seqlens)
        else:
            features, state = padding.read_padded(self.model, ids, mask, cache.state, cache.features)
        if cu_seqlens is not None:
            cache.take(state, self.model.config, features[0, cu_seqlens[1:].long() - 1, None].clone())
        else:
            cache.advance(state, self.model.config, features[:, -1:].clone(), mask, ids.shape[1])
        return features

    def _check_call(
        self, ids: Any, inputs_embeds: Any, output_attentions: Any, output_hidden_states: Any, labels: Any, keep: Any
    ) -> None:
        require(
            inputs_embeds is None, "forward: inputs_embeds is not supported: the model reads token ids. Give input_ids."
        )
        require(ids is not None, "forward: needs input_ids [B, T].")
        require(
            not (output_attentions or output_hidden_states),
            "forward: output_attentions and output_hidden_states are not available; to look inside, use hooks on "
            "model.to_model().blocks.",
        )
        require(
            self.model.head is not None or not hasattr(self.model.embedding, "lora_embedding_A"),
            "an adapter on the embedding would not reach the head, which shares its weights, and could not be merged. "
            'Leave "embedding" out of target_modules, or train it whole: modules_to_save=["embedding"].',
        )
        require(
            labels is None or labels.shape == ids.shape,
            f"forward: labels must have the shape of input_ids {list(ids.shape)}, got "
            f"{list(labels.shape) if labels is not None else None}.",
        )
        whole = isinstance(keep, int) and keep == 0
        require(labels is None or whole, "forward: the loss needs all logits; leave logits_to_keep out with labels.")
        require(isinstance(keep, Tensor) or keep >= 0, f"forward: logits_to_keep must be 0 (all) or more, got {keep}.")


def _build(config: FastweightConfig) -> Model:
    """A model in torch's default dtype, where each module itself says which of its weights stay float32 or wider."""
    wanted = torch.get_default_dtype()
    torch.set_default_dtype(torch.promote_types(wanted, torch.float32))
    try:
        return Model(config.to_model_config()).to(wanted)
    finally:
        torch.set_default_dtype(wanted)


def _keep(features: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    if isinstance(logits_to_keep, Tensor):
        return features[:, logits_to_keep]
    return features[:, -logits_to_keep:] if logits_to_keep else features


def _offsets(*given: Tensor | None) -> Tensor | None:
    """The one description of a packed row that is given under several names."""
    found = [t for t in given if t is not None]
    require(
        all(t is found[0] or torch.equal(t, found[0]) for t in found),
        "cu_seqlens, cu_seq_lens_q and cu_seq_lens_k describe different packings. Queries and keys are the same tokens "
        "here: give one of them.",
    )
    return found[0] if found else None


def _layout(
    ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cu_seqlens: Tensor | None,
    cache: FastweightCache,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """(mask, cu_seqlens): where the tokens stand in ids [B, T]; at most one of the two is given back."""
    require(
        isinstance(cache, FastweightCache),
        f"past_key_values must be a FastweightCache, got {type(cache).__name__}. Leave it out to start anew.",
    )
    require(ids.dim() == 2, f"input_ids must be [B, T], got {list(ids.shape)}.")
    shape = (ids.shape[0], ids.shape[1])
    mask = padding.new_columns(attention_mask, shape, cache.columns)
    require(
        mask is None or cu_seqlens is None, "a packed row has no padding: give cu_seqlens or attention_mask, not both."
    )
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, ids.shape[1], ids.shape[0])
    if position_ids is not None:
        if cu_seqlens is None and mask is None and cache.state is None and shape[0] == 1:
            cu_seqlens = padding.document_offsets(position_ids)
        padding.check_positions(position_ids, mask, shape, cache.state, cu_seqlens)
    return mask, cu_seqlens
