"""Loss and exact match, against transformers and against numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch

from infer.evaluate import Score, _groups, _padded_length, exact_match, score
from llama_jax.config import Compute
from tests.reference import reference_model
from tests.tiny import FAMILIES, tiny_params

pytestmark = pytest.mark.compiled_quickly

COMPUTE = Compute()


def make_sequences(lengths: list[int], seed: int = 0) -> list[tuple[list[int], list[int]]]:
    rng = np.random.default_rng(seed)
    return [(rng.integers(3, 128, n).tolist(), rng.integers(0, 2, n).tolist()) for n in lengths]


def reference_loss(model: torch.nn.Module, sequences) -> tuple[float, int]:
    total, count = 0.0, 0
    for ids, mask in sequences:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double()
        chosen = torch.log_softmax(logits[:-1], dim=-1)[range(len(ids) - 1), ids[1:]]
        weights = torch.tensor(mask[1:]).double()
        total -= float((chosen * weights).sum())
        count += int(weights.sum())
    return total / count, count


@pytest.mark.parametrize("family", ["llama-gqa", "mixtral"])
def test_the_loss_is_that_of_transformers_token_by_token(family: str) -> None:
    config = FAMILIES[family]
    params = tiny_params(config)
    sequences = make_sequences([40, 3, 33, 7, 100, 12, 1])
    wanted, count = reference_loss(reference_model(config, params), sequences)
    got = score(config, params, sequences, compute=COMPUTE)
    assert got.tokens == count
    assert got.loss == pytest.approx(wanted, abs=1e-5)
    assert got.perplexity == pytest.approx(math.exp(wanted), rel=1e-5)


def test_batching_and_order_change_nothing() -> None:
    config = FAMILIES["llama-gqa"]
    params = tiny_params(config)
    sequences = make_sequences([5, 31, 32, 33, 64, 65, 9, 9, 9])
    together = score(config, params, sequences, compute=COMPUTE)
    alone = score(config, params, sequences[::-1], compute=COMPUTE, batch_tokens=1)
    assert together.tokens == alone.tokens
    assert together.loss == pytest.approx(alone.loss, abs=1e-6)


def test_it_is_the_tokens_that_weigh_not_the_rows() -> None:
    config = FAMILIES["llama-gqa"]
    params = tiny_params(config)
    short, long = [(ids, [1] * len(ids)) for ids, _ in make_sequences([2, 21])]
    one = score(config, params, [short], compute=COMPUTE)
    twenty = score(config, params, [long], compute=COMPUTE)
    both = score(config, params, [short, long], compute=COMPUTE)
    assert (one.tokens, twenty.tokens, both.tokens) == (1, 20, 21)
    assert both.loss == pytest.approx((one.loss + 20 * twenty.loss) / 21, abs=1e-6)


def test_batches_have_no_more_rows_than_there_are() -> None:
    sequences = make_sequences([5, 9])
    assert [rows.batch.tokens.shape for rows in _groups(sequences, 6_400_000)] == [(2, 32)]


def test_progress_ends_at_the_number_of_rows() -> None:
    config = FAMILIES["llama-gqa"]
    seen: list[tuple[int, int]] = []
    score(
        config,
        tiny_params(config),
        make_sequences([4, 4, 40, 4]),
        compute=COMPUTE,
        batch_tokens=64,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (4, 4)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        (([], []), "sequence 0 has no token"),
        (([5, 6], [1]), "2 tokens and a mask of 1"),
        (([5] * 257, [1] * 257), "257 tokens, more than the context of 256"),
        (([5, 128], [1, 1]), "token id 128, outside the vocabulary of 128"),
        (([5, -1], [1, 1]), "token id -1, outside"),
        (([5], [1]), "no token counts"),
        (([5, 6, 7], [1, 0, 0]), "no token counts"),
    ],
)
def test_what_cannot_be_scored_is_refused(sequence, message: str) -> None:
    config = FAMILIES["llama-gqa"]
    with pytest.raises(ValueError, match=message):
        score(config, tiny_params(config), [sequence], compute=COMPUTE)


def test_lengths_are_padded_to_few_sizes() -> None:
    sizes = [_padded_length(n) for n in range(1, 400)]
    assert sorted(set(sizes)) == [32, 48, 64, 96, 128, 192, 256, 384, 512]
    assert all(size >= n for n, size in enumerate(sizes, start=1))


def test_a_loss_beyond_floats_is_an_infinite_perplexity() -> None:
    assert Score(loss=1000.0, tokens=1).perplexity == math.inf
    assert Score(loss=0.0, tokens=1).perplexity == 1.0


def test_exact_match() -> None:
    assert exact_match(["a", " b\n", "c"], ["a", "b", "C"]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="nothing to compare"):
        exact_match([], [])
    with pytest.raises(ValueError, match=r"shorter|longer"):
        exact_match(["a"], ["a", "b"])
