"""The face against the native model: the same logits and losses, whatever the padding."""

import pytest
import torch
from hf.faces import KINDS, VOCAB, face_of, ids_of, law_models, models
from tolerances import GRADIENT, OUTPUT, assert_close
from torch.nn import functional as F

from fastweight.hf import FastweightConfig, FastweightForCausalLM

every_kind = pytest.mark.parametrize("kind", KINDS)
LAW_MODELS = law_models()
# Two rows of 9 columns: left, right, interior and mixed padding, and a row that is padding altogether.
MASKS = {
    "left": [[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9],
    "right": [[1, 1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 0]],
    "interior": [[1, 1, 0, 0, 1, 1, 1, 0, 1], [1] * 9],
    "mixed": [[0, 1, 0, 1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1, 1]],
    "empty row": [[0] * 9, [0, 1, 1, 1, 1, 1, 1, 1, 1]],
}


@pytest.mark.parametrize("name", LAW_MODELS)
def test_logits_are_those_of_the_native_model_bit_for_bit(name):
    model, ids = LAW_MODELS[name], ids_of(2, 19)
    assert torch.equal(FastweightForCausalLM.from_model(model)(ids).logits, model(ids)[0])


@every_kind
def test_a_model_built_from_the_config_computes_what_the_native_model_computes(kind):
    model, ids = models()[kind], ids_of(2, 19)
    face = FastweightForCausalLM(FastweightConfig(model.config)).eval()
    face.load_state_dict({f"model.{name}": value for name, value in model.state_dict().items()})
    assert torch.equal(face(ids).logits, model(ids)[0])


def alone(model, ids, mask):
    """Logits of each row read by itself without its padding."""
    return [model(row[keep][None])[0][0] for row, keep in zip(ids, mask) if keep.any()]


@every_kind
@pytest.mark.parametrize("padding", MASKS)
def test_padding_changes_no_value_and_no_gradient(kind, padding):
    face, ids = face_of(kind, torch.float64), ids_of(2, 9)
    mask = torch.tensor(MASKS[padding])
    keep = mask.bool()
    weights = torch.randn(int(mask.sum()), VOCAB, dtype=torch.float64)
    logits = face(ids, attention_mask=mask).logits[keep]
    want = torch.cat(alone(face.model, ids, keep))
    assert_close(logits, want, OUTPUT[torch.float64])
    parameters = [p for p in face.parameters() if p.requires_grad]
    got_grads = torch.autograd.grad((logits * weights).sum(), parameters, allow_unused=True)
    want_grads = torch.autograd.grad((want * weights).sum(), parameters, allow_unused=True)
    for got, grad in zip(got_grads, want_grads):
        assert (got is None) == (grad is None)
        if got is not None:
            assert_close(got, grad, GRADIENT[torch.float64])


@every_kind
def test_what_stands_at_padding_is_never_read(kind):
    face, ids, mask = face_of(kind), ids_of(2, 9), torch.tensor(MASKS["mixed"])
    other = torch.where(mask.bool(), ids, (ids + 5) % VOCAB)
    got, want = (face(x, attention_mask=mask) for x in (other, ids))
    assert torch.equal(got.logits, want.logits)


def test_the_logits_at_padding_are_those_of_the_token_before_it():
    face, ids = face_of("hybrid"), ids_of(1, 6)
    logits = face(ids, attention_mask=torch.tensor([[0, 1, 0, 1, 0, 0]])).logits[0]
    assert torch.equal(logits[2], logits[1])
    assert torch.equal(logits[4:], logits[3:4].expand(2, -1))


@every_kind
@pytest.mark.parametrize("how", ["cu_seqlens", "position_ids"])
def test_packed_documents_equal_the_documents_alone(kind, how):
    face, ids = face_of(kind, torch.float64), ids_of(1, 20)
    lengths = [7, 1, 12]
    packing = {
        "cu_seqlens": torch.tensor([0, 7, 8, 20]),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
    }
    got = face(ids, **{how: packing[how]}).logits[0]
    want = torch.cat([face.model(document[None])[0][0] for document in ids[0].split(lengths)])
    assert_close(got, want, OUTPUT[torch.float64])


@pytest.mark.parametrize("names", [False, True])
def test_what_the_flattening_collator_of_transformers_makes_is_read_as_it_is_meant(names):
    from transformers import DataCollatorWithFlattening

    documents = ids_of(1, 20)[0].split([7, 1, 12])
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=names)
    batch = collate([{"input_ids": document.tolist()} for document in documents])
    assert ("cu_seq_lens_q" in batch) == names
    face = face_of("hybrid")
    sums = [F.cross_entropy(face.model(d[None])[0][0, :-1], d[1:], reduction="sum") for d in documents if len(d) > 1]
    assert_close(face(**batch).loss, sum(sums) / 17, OUTPUT[torch.float32])


@pytest.mark.parametrize("keep", [1, 4, torch.tensor([0, 5])])
def test_kept_logits_are_columns_of_all_logits(keep):
    face, ids = face_of("hybrid"), ids_of(2, 9)
    columns = slice(-keep, None) if isinstance(keep, int) else keep
    assert_close(face(ids, logits_to_keep=keep).logits, face(ids).logits[:, columns], OUTPUT[torch.float32])


def test_the_loss_is_the_mean_over_labels_that_are_not_ignored():
    face, ids = face_of("hybrid"), ids_of(2, 9)
    labels = ids.clone()
    labels[0, 3:6] = -100
    logits = face(ids).logits
    rows = [(b, t) for b in range(2) for t in range(1, 9) if labels[b, t] >= 0]
    want = -torch.stack([logits[b, t - 1].log_softmax(-1)[labels[b, t]] for b, t in rows]).mean()
    assert_close(face(ids, labels=labels).loss, want, OUTPUT[torch.float32])


@pytest.mark.parametrize("padding", MASKS)
def test_the_loss_of_a_padded_batch_is_that_of_its_rows_alone(padding):
    face, ids, mask = face_of("hybrid", torch.float64), ids_of(2, 9), torch.tensor(MASKS[padding])
    rows = [row[keep] for row, keep in zip(ids, mask.bool())]
    losses = [
        F.cross_entropy(face.model(row[None])[0][0, :-1].float(), row[1:], reduction="sum") for row in rows if len(row)
    ]
    want = torch.stack(losses).sum() / sum(max(len(row) - 1, 0) for row in rows)
    assert_close(face(ids, attention_mask=mask, labels=ids).loss, want, OUTPUT[torch.float32])


def test_no_document_of_a_packed_row_predicts_the_next():
    face, ids = face_of("delta"), ids_of(1, 12)
    cu_seqlens = torch.tensor([0, 5, 12])
    sums = [
        F.cross_entropy(face.model(part[None])[0][0, :-1], part[1:], reduction="sum") for part in ids[0].split([5, 7])
    ]
    assert_close(face(ids, cu_seqlens=cu_seqlens, labels=ids).loss, sum(sums) / 10, OUTPUT[torch.float32])


def test_num_items_in_batch_divides_the_sum():
    face, ids = face_of("delta"), ids_of(2, 9)
    mean, scaled = face(ids, labels=ids).loss, face(ids, labels=ids, num_items_in_batch=torch.tensor(64)).loss
    assert_close(scaled, mean * 16 / 64, OUTPUT[torch.float32])


@every_kind
def test_gradient_checkpointing_changes_no_gradient(kind):
    ids, gradients = ids_of(2, 9), []
    for on in (False, True):
        face = face_of(kind, torch.float64).train()
        if on:
            face._set_gradient_checkpointing(True)
            assert face.gradient_checkpointing
            assert face.model.checkpointing
        face(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in face.parameters()])
    for got, want in zip(*gradients):
        assert got is want is None or torch.equal(got, want)


@pytest.mark.parametrize("kind", ["delta", "lact"])
def test_embeddings_and_head_are_found_and_replaced(kind):
    face = face_of(kind)
    tied = face.config.tie_word_embeddings
    assert face.get_input_embeddings() is face.model.embedding
    assert face.get_output_embeddings() is (face.model.embedding if tied else face.model.head)
    other = torch.nn.Embedding(VOCAB, 16)
    face.set_input_embeddings(other)
    assert face.model.embedding is other
    assert (face.get_output_embeddings() is other) == tied


@pytest.mark.parametrize("kind", ["delta", "lact"])
def test_resizing_the_vocabulary_keeps_the_old_logits(kind):
    face, ids = face_of(kind), ids_of(1, 9)
    want = face(ids).logits
    face.resize_token_embeddings(VOCAB + 6, mean_resizing=False)
    assert face.config.vocab_size == face.model.config.vocab_size == VOCAB + 6
    assert_close(face(ids).logits[..., :VOCAB], want, OUTPUT[torch.float32])


BAD = {
    "inputs_embeds": ({"inputs_embeds": torch.zeros(1, 4, 16)}, "inputs_embeds is not supported"),
    "nothing": ({}, "needs input_ids"),
    "attentions": ({"input_ids": ids_of(1, 4), "output_attentions": True}, "not available"),
    "wrong ids": ({"input_ids": torch.tensor([[1, VOCAB]])}, "outside the vocabulary"),
    "flat ids": ({"input_ids": ids_of(4)}, "must be"),
    "mask shape": ({"input_ids": ids_of(1, 4), "attention_mask": torch.ones(1, 3)}, "attention_mask must be"),
    "additive mask": ({"input_ids": ids_of(1, 4), "attention_mask": torch.full((1, 4), -1e4)}, "0 .padding. and 1"),
    "positions": (
        {"input_ids": ids_of(1, 4), "position_ids": torch.arange(4)[None] + 3},
        "row 0 has 3 in column 0, need 0",
    ),
    "labels shape": ({"input_ids": ids_of(1, 4), "labels": ids_of(1, 3)}, "shape of input_ids"),
    "labels, cut": ({"input_ids": ids_of(1, 4), "labels": ids_of(1, 4), "logits_to_keep": 1}, "all logits"),
    "both": (
        {"input_ids": ids_of(1, 4), "cu_seqlens": torch.tensor([0, 4]), "attention_mask": torch.tensor([[0, 1, 1, 1]])},
        "not both",
    ),
    "offsets": ({"input_ids": ids_of(1, 4), "cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens"),
    "two packings": (
        {"input_ids": ids_of(1, 4), "cu_seqlens": torch.tensor([0, 4]), "cu_seq_lens_k": torch.tensor([0, 2, 4])},
        "describe different packings",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_call_says_what_is_wrong(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        face_of("delta")(**call)
