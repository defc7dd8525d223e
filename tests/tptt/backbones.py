"""A tiny pretrained folder with weights and tokenizer, standing in for a name on the hub."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXTS = ["Give three tips for staying healthy.", "What are the three primary colours?", "Bonjour, I'm a small model."]


def bpe_tokenizer():
    """A byte-level BPE without a padding token, as Llama's is."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=280, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1])


def llama(tied=False, dtype=torch.float32, vocab=None, seed=0):
    """A random Llama with large weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab or 64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def folder_with_tokenizer(folder):
    """Weights and tokenizer of a tiny Llama in `folder`."""
    tokenizer = bpe_tokenizer()
    llama(vocab=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
