"""A model that says what it is told to, and a word tokenizer to read it with."""

import itertools

import jax.numpy as jnp
import numpy as np
import tokenizers
from tokenizers import decoders, models

from llama_jax import tree
from llama_jax.formats.tokenizer import Tokenizer
from llama_jax.formats.tokenizer_files import TokenizerSettings
from llama_jax.weights.table import weight_table
from tests.tiny import tiny_config


def scripted_params(config, successor: dict[int, int]):
    """Parameters of a Llama whose most likely token after t is successor[t].

    Its layers add nothing, so a token's final state is its own embedding, and the head has that
    embedding in the successor's row.
    """
    rng = np.random.default_rng(0)
    leaves = {p: np.zeros(w.shape, np.float32) for p, w in weight_table(config).items()}
    directions = rng.normal(size=(config.vocab_size, config.hidden_size)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    leaves["embed_tokens.weight"] = directions
    leaves["norm.weight"] += 1
    for token, following in successor.items():
        leaves["lm_head.weight"][following] += directions[token]
    return tree.unflatten({path: jnp.asarray(array) for path, array in leaves.items()})


def word_tokenizer(
    words: list[str], *, special: tuple[str, ...] = ("<s>", "</s>"), template: str | None = None
) -> Tokenizer:
    """Ids in the order of `special`, then `words`; texts are joined without spaces."""
    vocabulary = {word: index for index, word in enumerate([*special, *words])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=special[0]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("|", "removed")
    backend.decoder = decoders.Fuse()
    settings = TokenizerSettings(
        named={"bos_token": special[0], "eos_token": special[1]},
        chat_templates={} if template is None else {"default": template},
    )
    return Tokenizer(backend, source="test", prefix_rule="none", settings=settings, adds_bos=False)


def scripted_model(words: list[str], said: list[str], *, eos=(1,), vocab_size=128, **kwargs):
    """(config, params, tokenizer) that after `said[0]` says the rest, one word a token."""
    tokenizer = word_tokenizer(words, **kwargs)
    config = tiny_config(vocab_size=vocab_size, bos_token_id=0, eos_token_id=tuple(eos))
    ids = [tokenizer.token_to_id(word) for word in said]
    assert None not in ids, "every word that is said must be in the vocabulary"
    params = scripted_params(config, dict(itertools.pairwise(ids)))
    return config, params, tokenizer
