"""Query and key rows between Meta's and Hugging Face's order."""

import numpy as np
import pytest
import torch

from llama_jax.formats.meta_layout import hf_to_meta, meta_to_hf


def test_R22_one_head():
    rows = np.array([["r0"], ["r1"], ["r2"], ["r3"]])
    assert meta_to_hf(rows, 1)[:, 0].tolist() == ["r0", "r2", "r1", "r3"]


def test_R23_keys_use_their_own_number_of_heads():
    rows = np.arange(8)
    assert meta_to_hf(rows, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert meta_to_hf(rows, 4).tolist() == list(range(8))


@pytest.mark.parametrize("shape", [(24,), (24, 5)])
@pytest.mark.parametrize("heads", [1, 2, 3, 6])
def test_R22_there_and_back(shape, heads):
    rows = np.random.default_rng(0).normal(size=shape)
    np.testing.assert_array_equal(hf_to_meta(meta_to_hf(rows, heads), heads), rows)
    np.testing.assert_array_equal(meta_to_hf(hf_to_meta(rows, heads), heads), rows)


def test_rotating_pairs_side_by_side_equals_rotating_halves():
    """The definition, not the reshape: interleaved rotation of Meta rows is the half rotation of
    the converted ones."""
    rng = np.random.default_rng(1)
    heads, size, width = 3, 8, 5
    weight, x = rng.normal(size=(heads * size, width)), rng.normal(size=width)
    angle = rng.normal(size=size // 2)
    meta = (weight @ x).reshape(heads, size // 2, 2)
    turned = (meta[..., 0] + 1j * meta[..., 1]) * np.exp(1j * angle)
    half = (meta_to_hf(weight, heads) @ x).reshape(heads, 2, size // 2)
    first = half[:, 0] * np.cos(angle) - half[:, 1] * np.sin(angle)
    second = half[:, 1] * np.cos(angle) + half[:, 0] * np.sin(angle)
    np.testing.assert_allclose(first, turned.real, atol=1e-12)
    np.testing.assert_allclose(second, turned.imag, atol=1e-12)


def test_same_as_the_published_conversion():
    """The formula of transformers' conversion script for Llama."""
    weight = torch.arange(4 * 6 * 3.0).reshape(24, 3)
    expected = weight.view(4, 3, 2, 3).transpose(1, 2).reshape(24, 3)
    np.testing.assert_array_equal(meta_to_hf(weight.numpy(), 4), expected.numpy())


def test_heads_that_do_not_fit():
    with pytest.raises(ValueError, match="24 rows do not make 5 heads"):
        meta_to_hf(np.zeros((24, 2)), 5)
    with pytest.raises(ValueError, match="even size"):
        hf_to_meta(np.zeros((9, 2)), 3)
