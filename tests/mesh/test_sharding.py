"""Any mesh gives the single-device result; what does not divide is named with what would."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from llama_jax import tree
from llama_jax.config import DEFAULT_RULES, Compute
from llama_jax.mesh.sharding import (
    batch_sharding,
    check_batch,
    constrain,
    make_mesh,
    partition_spec,
    shardings,
    validate,
)
from llama_jax.model import transformer
from llama_jax.model.losses import next_token_loss
from llama_jax.weights.adapted import LoraTensor
from llama_jax.weights.table import weight_table
from tests.model.test_losses import make_batch
from tests.tiny import FAMILIES, tiny_config, tiny_params, tiny_tokens

pytestmark = pytest.mark.compiled_quickly

MESHES = [
    {"data": 8},
    {"fsdp": 8},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 4, "tensor": 2},
    {"fsdp": 2, "tensor": 2, "expert": 2},
    {"context": 8},
    {"fsdp": 2, "tensor": 2, "context": 2},
]


# The gradient of a ragged product compiles slowly: experts on the meshes that differ for them.
CASES = [(family, sizes) for family in ("llama-gqa", "llama-tied") for sizes in MESHES] + [
    ("mixtral", sizes) for sizes in MESHES if "expert" in sizes or sizes == {"fsdp": 8}
]


@pytest.mark.parametrize(("family", "sizes"), CASES, ids=str)
def test_sharded_equals_unsharded(family, sizes):
    config = FAMILIES[family]
    params, tokens = tiny_params(config), tiny_tokens(8, 16)
    batch = make_batch(tokens)
    compute = Compute(loss_chunk_tokens=24)

    def value(params, batch):
        def loss(params):
            return next_token_loss(config, params, batch, compute=compute)[0]

        logits = transformer.forward(config, params, batch.tokens, compute=compute)
        return logits, jax.value_and_grad(loss)(params)

    expected = jax.jit(value)(params, batch)
    mesh = make_mesh(sizes)
    placed = jax.device_put(params, shardings(config, params, mesh))
    with jax.set_mesh(mesh):
        got = jax.jit(value)(placed, jax.device_put(batch, batch_sharding(mesh)))
    np.testing.assert_allclose(got[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(got[1][0], expected[1][0], rtol=1e-6)
    for path, gradient in tree.flatten(got[1][1]).items():
        whole = tree.flatten(expected[1][1])[path]
        scale = float(jnp.abs(whole).max()) + 1e-6
        np.testing.assert_allclose(gradient, whole, atol=1e-5 * scale, err_msg=path)


EMBED = ("fsdp", "context", "expert")
EXPERT_EMBED = ("fsdp", "context")


def test_every_weight_of_a_matrix_is_spread_over_fsdp_and_tensor():
    config = FAMILIES["mixtral"]
    mesh = make_mesh({"fsdp": 2, "tensor": 2, "expert": 2})
    places = tree.flatten(shardings(config, tiny_params(config), mesh))
    assert set(places) == set(weight_table(config))
    assert places["layers.self_attn.q_proj.weight"].spec == PartitionSpec(None, "tensor", EMBED)
    assert places["layers.self_attn.o_proj.weight"].spec == PartitionSpec(None, EMBED, "tensor")
    assert places["layers.block_sparse_moe.experts.w2.weight"].spec == PartitionSpec(
        None, "expert", EXPERT_EMBED, "tensor"
    )
    assert places["embed_tokens.weight"].spec == PartitionSpec("tensor", EMBED)


def test_both_factors_of_an_adapter_are_spread():
    config = FAMILIES["llama-gqa"]
    params = tree.flatten(tiny_params(config))
    path = "layers.self_attn.q_proj.weight"
    params[path] = LoraTensor(
        params[path], jnp.zeros((2, 4, 64)), jnp.zeros((2, 64, 4)), jnp.ones(2), (4, 4)
    )
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    place = tree.flatten(shardings(config, tree.unflatten(params), mesh))[path]
    assert place.lora_a.spec == PartitionSpec(None, None, EMBED)
    assert place.lora_b.spec == PartitionSpec(None, ("tensor", *EMBED), None)
    assert place.base.spec == PartitionSpec(None, "tensor", EMBED)


def test_heads_are_counted_as_heads():
    with pytest.raises(ValueError, match=r"tensor of size 4 .* kv_heads = 2; nearest .*: 2"):
        validate(FAMILIES["llama-gqa"], make_mesh({"data": 2, "tensor": 4}))


def test_every_dimension_that_does_not_divide_is_named():
    config = tiny_config(vocab_size=129, intermediate_size=90)
    with pytest.raises(ValueError) as error:
        validate(config, make_mesh({"data": 2, "tensor": 4}))
    text = str(error.value)
    assert "vocab = 129; nearest that do: 3 or 43" in text
    assert "mlp = 90; nearest that do: 3 or 5" in text


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, "needs 3 devices, but there are 8"),
        ({"data": -1, "fsdp": -1}, "data and fsdp are both -1"),
        ({"data": -1, "fsdp": 3}, "does not divide 8 devices"),
        ({"model": 2}, "mesh axis 'model' is unknown"),
        ({"data": 0}, "mesh.data is 0"),
        ({"data": 2.0}, "mesh.data is 2.0"),
        ({"data": True}, "mesh.data is True"),
        ({"data": np.bool_(True)}, "mesh.data is "),
    ],
)
def test_meshes_that_cannot_be(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(sizes)


def test_minus_one_takes_what_is_left():
    assert make_mesh({"fsdp": -1, "tensor": 2}).shape["fsdp"] == 4
    counted = make_mesh({"fsdp": np.int64(-1), "tensor": np.int32(2)})
    assert counted.shape["fsdp"] == 4 and type(counted.shape["tensor"]) is int


def test_two_axes_of_an_array_may_not_share_a_mesh_axis():
    rules = tuple((name, "fsdp" if name == "vocab" else axis) for name, axis in DEFAULT_RULES)
    with pytest.raises(ValueError, match="'vocab' and 'embed' of one array on mesh axis 'fsdp'"):
        partition_spec(("vocab", "embed"), rules)


def test_a_batch_that_cannot_be_dealt_out_is_refused_with_the_nearest():
    mesh = make_mesh({"data": 2, "fsdp": 4})
    check_batch(16, 7, mesh)
    said = r"batch size {} \(.*train.batch_size .*_steps.*\) is not a multiple of 8.*{}$"
    with pytest.raises(ValueError, match=said.format(12, "nearest that are: 8 and 16")):
        check_batch(12, 7, mesh)
    with pytest.raises(ValueError, match=said.format(3, "the smallest that is: 8")):
        check_batch(3, 7, mesh)


def test_sequences_that_cannot_be_divided_are_refused_with_the_nearest():
    mesh = make_mesh({"data": 2, "context": 4})
    check_batch(2, 16, mesh)
    with pytest.raises(ValueError, match="20 is not a multiple of 8, twice .*context.*: 16 and 24"):
        check_batch(2, 20, mesh)


def test_constrain_needs_no_mesh():
    x = jnp.ones((2, 2))
    assert constrain(x, ("batch", None)) is x
