"""The weights of one layer as products want them on a mesh: whole, and each just before its own."""

from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.config import Compute, ModelConfig
from llama_jax.mesh.sharding import gathered
from llama_jax.weights.adapted import is_adapted
from llama_jax.weights.leaf import Leaf
from llama_jax.weights.quantized import is_quantized
from llama_jax.weights.table import weight_table
from llama_jax.weights.tensors import QatTensor, TappedTensor


def gathered_layer(config: ModelConfig, compute: Compute, layer: Any) -> Any:
    """The state of one layer with the weights of its linear layers in the compute dtype and, on a
    mesh, whole along `embed`, which is what fsdp splits: said here, each is fetched once, just
    before its product. Left to itself the TPU compiler multiplies piece by piece into wide sums,
    which takes four times the memory traffic. Biases, norms, experts and quantized weights are left
    to it."""
    table, dtype = weight_table(config), jnp.dtype(compute.dtype)

    def gather(keys: Any, leaf: Leaf) -> Leaf:
        names = [key.key for key in keys if isinstance(key, jax.tree_util.DictKey)]
        row = table.get(".".join(["layers", *names]))
        if row is None or row.role != "matrix":
            return leaf
        return gathered(leaf, row.axes[1:], dtype, compute.rules)

    return jax.tree_util.tree_map_with_path(
        gather,
        layer,
        is_leaf=lambda x: (
            is_adapted(x) or is_quantized(x) or isinstance(x, QatTensor | TappedTensor)
        ),
    )
