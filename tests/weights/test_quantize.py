"""Quantized values, scales and bytes, by hand and by bound; products equal explicit matrices."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import tree
from llama_jax.config import Compute
from llama_jax.mesh.sharding import make_mesh, shardings
from llama_jax.model import transformer
from llama_jax.weights.dot import dot, embed
from llama_jax.weights.lora import add_lora
from llama_jax.weights.lora_config import LoraConfig
from llama_jax.weights.quantize import SCHEMES, encode, quantize
from llama_jax.weights.quantized import (
    NF4_VALUES,
    PackedTensor,
    is_quantized,
    pack_nibbles,
    signed_nibbles,
    unpack_nibbles,
)
from llama_jax.weights.table import weight_table
from llama_jax.weights.tensors import to_array
from tests.adapters import trained
from tests.tiny import FAMILIES, quantize_array, tiny_config, tiny_params, tiny_tokens

pytestmark = pytest.mark.compiled_quickly

# Largest error of a value, as a share of the largest magnitude of its tile: half the widest step
# between neighbouring codes. bfloat16 scales of short rows add 2**-8.
BOUNDS = {
    "int8": 0.5 / 127,
    "int4": 0.5 / 7,
    "nf4": max(b - a for a, b in itertools.pairwise(NF4_VALUES)) / 2,
    "fp8": 16 / 448,
}


def gaussian(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def integers(leaf):
    if isinstance(leaf, PackedTensor):
        return np.asarray(signed_nibbles(unpack_nibbles(leaf.packed, leaf.size)))
    return np.asarray(leaf.qvalue)


def live_bytes(params):
    """What the arrays take in memory, where an int4 array would take a byte a value."""
    return sum(array.nbytes for array in jax.tree.leaves(params))


@pytest.mark.parametrize(("scheme", "expected"), [("int8", [-127, 64, 127]), ("int4", [-7, 4, 7])])
def test_integer_codes_round_half_to_even(scheme, expected):
    """R72: 0.5 * 127 = 63.5 -> 64, 0.5 * 7 = 3.5 -> 4; 2.5 -> 2 is the other direction."""
    weight = jnp.array([[-1.0, 0.5, 1.0]])
    leaf = quantize_array(weight, scheme=scheme)
    assert integers(leaf).tolist() == [expected]
    assert float(jnp.abs(to_array(leaf) - weight).max()) <= float(leaf.scale[0, 0]) / 2 * 1.0001
    even = jnp.array([[SCHEMES[scheme].largest, 2.5, -2.5, 1.5]])
    assert integers(quantize_array(even, scheme=scheme)).tolist()[0][1:] == [2, -2, 2]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_values_out_of_range_clamp(scheme):
    """R72: with a peak given from elsewhere, larger values stay at the largest code."""
    values = jnp.array([-1e6, -1.5, 0.0, 1.5, 1e6])
    inside = jnp.array([-1.0, -1.0, 0.0, 1.0, 1.0])
    stored, _ = encode(values, jnp.float32(1.0), scheme=SCHEMES[scheme])
    expected, _ = encode(inside, jnp.float32(1.0), scheme=SCHEMES[scheme])
    np.testing.assert_array_equal(np.asarray(stored, np.float32), np.asarray(expected, np.float32))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("small", [0.0, 1e-40])
def test_channels_of_zeros_stay_zero(scheme, small):
    """R71: one zero channel among others, a zero tensor, and values too small for a scale."""
    for weight in (
        gaussian(4, 64).at[1].set(small),
        jnp.full((2, 4, 80), small),
    ):
        leaf = quantize_array(weight, scheme=scheme)
        assert np.isfinite(np.asarray(leaf.scale, np.float32)).all()
        assert (np.asarray(to_array(leaf))[..., 1, :] == 0).all()
        assert np.isfinite(np.asarray(to_array(leaf))).all()


def test_scales_follow_the_output_rows():
    """R74: [[1, 100], [0.5, 50]] stored [in, out] is [[1, 0.5], [100, 50]] as [out, in]."""
    leaf = quantize_array(jnp.array([[1.0, 0.5], [100.0, 50.0]]), scheme="int8")
    np.testing.assert_allclose(leaf.scale, [[1 / 127], [100 / 127]], rtol=1e-7)
    np.testing.assert_allclose(to_array(leaf), [[1, 64 / 127], [100, 6400 / 127]], rtol=1e-6)


def test_nibbles_are_packed_low_first():
    """R73, with odd rows and rows of rows."""
    packed = pack_nibbles(jnp.array([-8, -1, 0, 7]))
    assert np.asarray(packed).tobytes() == bytes.fromhex("F870")
    assert signed_nibbles(unpack_nibbles(packed, 4)).tolist() == [-8, -1, 0, 7]
    assert np.asarray(pack_nibbles(jnp.array([1, 2, -3]))).tobytes() == bytes.fromhex("210D")
    for size in (1, 7, 8):
        values = jax.random.randint(jax.random.key(size), (3, 2, size), -8, 8)
        held = pack_nibbles(values)
        assert held.shape == (3, 2, (size + 1) // 2)
        np.testing.assert_array_equal(signed_nibbles(unpack_nibbles(held, size)), values)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("size", "dtype"), [(96, "float32"), (33, "bfloat16")])
def test_error_is_within_the_bound(scheme, size, dtype):
    weight = gaussian(3, 8, size).astype(dtype)
    leaf = quantize_array(weight, scheme=scheme)
    assert leaf.shape == weight.shape
    tile = size if leaf.scale.shape[-1] == 1 else 64
    wide = np.asarray(weight, np.float32)
    error = np.abs(np.asarray(to_array(leaf)) - wide)
    slack = 2**-8 if leaf.scale.dtype == jnp.bfloat16 else 1e-6
    for start in range(0, size, tile):
        part = slice(start, start + tile)
        peak = np.abs(wide[..., part]).max(axis=-1, keepdims=True)
        assert (error[..., part] <= (BOUNDS[scheme] + slack) * peak).all()
    if scheme in ("int8", "int4"):  # codes are made for the scale as it is stored
        held = np.repeat(np.asarray(leaf.scale, np.float32), tile, axis=-1)[..., :size]
        assert (error <= 0.5001 * held).all()
    # The error is not small for a trivial reason, and rounding is not truncation.
    assert error.max() > 0.3 * BOUNDS[scheme] * np.abs(wide).max() * (scheme != "fp8")


def test_nf4_takes_the_nearest_of_its_values():
    weight = jnp.linspace(-1.0, 1.0, 201)[None]
    leaf = quantize_array(weight, scheme="nf4", tile=201)
    table = np.asarray(NF4_VALUES, np.float32)
    expected = table[np.abs(np.asarray(weight)[0][:, None] - table).argmin(axis=1)]
    np.testing.assert_allclose(to_array(leaf)[0], expected, atol=1e-6)
    assert {round(float(v), 5) for v in to_array(leaf)[0]} == {round(v, 5) for v in NF4_VALUES}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_products_and_rows_equal_the_explicit_matrix(scheme):
    leaf = quantize_array(gaussian(24, 96), scheme=scheme)
    matrix, x, ids = to_array(leaf), gaussian(2, 3, 96, seed=1), jnp.array([[0, 23], [7, 7]])
    got = jax.jit(lambda x, w: dot(x, w, compute=Compute()))(x, leaf)
    np.testing.assert_allclose(got, x @ matrix.T, atol=2e-5)
    np.testing.assert_allclose(embed(leaf, ids, compute=Compute()), matrix[ids], atol=1e-6)
    narrow = dot(x.astype(jnp.bfloat16), leaf, compute=Compute(dtype="bfloat16"))
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow.astype(jnp.float32), x @ matrix.T, atol=0.3)


@pytest.mark.parametrize("size", [32, 64, 96, 576, 4096])
@pytest.mark.parametrize("scheme", ["int4", "nf4"])
def test_four_bit_weights_take_at_most_0_6_bytes(scheme, size):
    """R60's budget, in live bytes, whatever the length of a row."""
    leaf = quantize_array(gaussian(8, size), scheme=scheme)
    assert live_bytes(leaf) <= 0.6 * 8 * size


@pytest.mark.parametrize("scheme", ["nf4", "int4"])
def test_qlora_memory(scheme):
    """R60: base bytes, and no second copy of embedding or head."""
    config = tiny_config(dtype="bfloat16")
    params = tiny_params(config)
    lora = LoraConfig(r=4)
    plain = add_lora(config, params, lora, jax.random.key(0))
    small = add_lora(config, quantize(config, params, scheme=scheme), lora, jax.random.key(0))
    rows = weight_table(config).values()
    quantized = sum(np.prod(row.shape) for row in rows if row.role == "matrix")
    others = 2 * sum(np.prod(row.shape) for row in rows if row.role != "matrix")
    adapter = live_bytes(plain) - live_bytes(params)
    assert live_bytes(small) - adapter <= 0.6 * quantized + others
    for path in ("embed_tokens", "lm_head"):
        assert small[path]["weight"] is params[path]["weight"]


def test_quantize_chooses_by_role_and_pattern():
    config = FAMILIES["mixtral"]
    params = tiny_params(config)
    roles = weight_table(config)

    def quantized(**options):
        leaves = tree.flatten(quantize(config, params, scheme="int8", **options))
        return {path for path, leaf in leaves.items() if is_quantized(leaf)}

    matrices = {path for path, row in roles.items() if row.role == "matrix"}
    assert quantized() == matrices
    assert quantized(skip=["self_attn", "role:router", "embed_tokens", "lm_head"]) == {
        path for path in matrices if "self_attn" not in path
    }
    assert quantized(skip=[]) == {p for p, row in roles.items() if row.role not in ("norm", "bias")}
    with pytest.raises(ValueError, match="did you mean 'self_attn'"):
        quantized(skip=["selfattn"])
    with pytest.raises(ValueError, match=r"skip \* leaves nothing to quantize"):
        quantized(skip=["*"])


def test_stacked_layers_are_quantized_each_for_itself():
    config = tiny_config()
    params = tiny_params(config)
    leaf = quantize(config, params, scheme="nf4")["layers"]["self_attn"]["q_proj"]["weight"]
    alone = quantize_array(params["layers"]["self_attn"]["q_proj"]["weight"][1], scheme="nf4")
    np.testing.assert_array_equal(leaf.packed[1], alone.packed)
    np.testing.assert_array_equal(leaf.scale[1], alone.scale)


def test_donated_originals_are_freed():
    config = tiny_config()
    params = tiny_params(config)
    kept = quantize(config, params, scheme="int8")
    assert not any(array.is_deleted() for array in jax.tree.leaves(params))
    given = quantize(config, params, scheme="int8", donate=True)
    assert params["layers"]["mlp"]["up_proj"]["weight"].is_deleted()
    assert not params["embed_tokens"]["weight"].is_deleted()
    jax.tree.map(np.testing.assert_array_equal, given, kept)


def test_wrong_input_is_refused():
    config = tiny_config()
    params = tiny_params(config)
    with pytest.raises(ValueError, match="allowed are int8, int4, nf4, fp8"):
        quantize(config, params, scheme="int3")
    with pytest.raises(ValueError, match="nearest that do: 4 and 6"):
        quantize(config, params, scheme="int8", tile=5)
    with pytest.raises(ValueError, match="positive integer"):
        quantize(config, params, scheme="nf4", tile=0)
    once = quantize(config, params, scheme="int8")
    with pytest.raises(ValueError, match="quantized already"):
        quantize(config, once, scheme="int8")
    adapted = add_lora(config, params, LoraConfig(r=2), jax.random.key(0))
    with pytest.raises(ValueError, match="has an adapter"):
        quantize(config, adapted, scheme="int8")
    for bad in (jnp.nan, jnp.inf):
        with pytest.raises(ValueError, match="not finite"):
            quantize_array(jnp.array([[1.0, bad]]), scheme="int8")


def test_tiles_have_their_own_scales():
    weight = jnp.concatenate([gaussian(4, 32), 100 * gaussian(4, 32, seed=1)], axis=1)
    for scheme in ("int8", "int4"):
        whole = quantize_array(weight, scheme=scheme, tile=64)
        tiled = quantize_array(weight, scheme=scheme, tile=32)
        assert tiled.scale.shape == (4, 2)

        def error(leaf):
            return float(jnp.abs(to_array(leaf) - weight)[:, :32].max())

        assert error(tiled) < 0.1 * error(whole)


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_sharded_equals_single(scheme):
    config = tiny_config()
    tokens = tiny_tokens(8, 6)
    base = quantize(config, tiny_params(config), scheme=scheme)
    params = trained(config, add_lora(config, base, LoraConfig(r=2), jax.random.key(0)))

    def run(params, tokens):
        return transformer.forward(config, params, tokens)

    expected = jax.jit(run)(params, tokens)
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    spread = jax.device_put(params, shardings(config, params, mesh))
    leaf = spread["layers"]["mlp"]["up_proj"]["weight"]
    main = leaf.base.packed if scheme == "nf4" else leaf.base.qvalue
    assert main.sharding.shard_shape(main.shape) == (2, 96 // 2, main.shape[2] // 4)
    assert leaf.lora_a.sharding.shard_shape(leaf.lora_a.shape) == (2, 2, 64 // 4)
    with jax.set_mesh(mesh):
        got = jax.jit(run)(spread, tokens)
    np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize("scheme", ["nf4", "int4"])
def test_scales_in_eight_bits(scheme):
    """Within the bound of the scheme and a 255th of the range of scales; no value clamped."""
    weight = gaussian(6, 640) * jnp.linspace(0.5, 3.0, 640)
    weight = weight.at[2].set(0).at[3, :64].set(0)
    plain = quantize_array(weight, scheme=scheme)
    small = quantize_array(weight, scheme=scheme, double=True)
    assert live_bytes(small) == 6 * (320 + 10 + 8) < live_bytes(plain) == 6 * (320 + 40)
    exact = np.asarray(plain.scale)
    held = np.asarray(small.scale.astype(jnp.float32))
    assert small.scale.shape == held.shape == exact.shape == (6, 10)
    live = np.ones((6, 10), bool)
    live[2], live[3, 0] = False, False
    scales = np.where(live, exact, np.nan)
    spread = np.nanmax(scales[[0, 1, 4, 5]], axis=1) - np.nanmin(scales[[0, 1, 4, 5]], axis=1)
    above = (held - exact)[[0, 1, 4, 5]]
    assert (above >= -1e-6).all() and (above <= spread[:, None] / 255 * 1.001).all()
    error = np.abs(np.asarray(to_array(small)) - np.asarray(weight)).reshape(6, 10, 64)
    widest = BOUNDS[scheme] * SCHEMES[scheme].largest
    assert (error.max(axis=-1) <= widest * held * 1.001).all()
    assert np.isfinite(held).all() and (np.asarray(to_array(small))[2] == 0).all()
    assert (np.asarray(to_array(small))[3, :64] == 0).all()
    x, ids = gaussian(3, 640, seed=1), jnp.array([0, 3])
    matrix = to_array(small)
    np.testing.assert_allclose(dot(x, small, compute=Compute()), x @ matrix.T, rtol=2e-5, atol=2e-4)
    np.testing.assert_allclose(embed(small, ids, compute=Compute()), matrix[ids], atol=1e-6)


def test_scales_of_short_rows_stay_as_they_are():
    leaf = quantize_array(gaussian(4, 192), scheme="nf4", double=True)
    assert isinstance(leaf.scale, jax.Array)
    with pytest.raises(ValueError, match="scheme int8 has too few for it to save anything"):
        quantize_array(gaussian(4, 640), scheme="int8", double=True)
    config = tiny_config()
    message = (
        "with tile 64 no weight has so many: the longest row is that of .*down_proj.weight, 96"
    )
    with pytest.raises(ValueError, match=message):
        quantize(config, tiny_params(config), scheme="nf4", double=True)
    quantize(config, tiny_params(config), scheme="nf4", double=True, tile=24)
