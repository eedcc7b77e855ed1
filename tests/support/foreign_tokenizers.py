"""Small folders as other projects publish them: a tokenizer, and a random model that transformers writes."""

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tests.support.texts import SENTENCES


def byte_level(special=("<|endoftext|>",), vocab_size=300, normalizer=None) -> Tokenizer:
    """A byte-level BPE tokenizer whose special tokens come first."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return backend


def begin_with(backend: Tokenizer, token: str) -> None:
    """Let the post-processor put a token before every text."""
    backend.post_processor = processors.TemplateProcessing(
        single=[token, "$A"], special_tokens=[(token, backend.token_to_id(token))]
    )


def save(backend: Tokenizer, folder: Path, **settings) -> Path:
    """Write tokenizer.json, and tokenizer_config.json with these settings."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def text_token(text: str, **flags) -> AddedToken:
    """A token that is added as text, after training."""
    return AddedToken(text, special=False, **{"normalized": False, **flags})


def llama(folder: Path, vocab_size: int, seed: int = 0, **config):
    """A random Llama that transformers saves into `folder`; returns it."""
    import transformers

    torch.manual_seed(seed)
    sizes = dict(hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4)
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    settings = {**sizes, "max_position_embeddings": 128, "initializer_range": 0.3, **ids, **config}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=vocab_size, **settings))
    model.save_pretrained(folder)
    return model.eval()
