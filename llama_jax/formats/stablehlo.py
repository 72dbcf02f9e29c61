"""A model as a program in StableHLO and the arrays it takes: for runtimes without this package.

`forward.stablehlo` is what `jax.export` serializes, StableHLO in its portable form with how to call
it: for CPUs, CUDA GPUs and TPUs, any number of rows, any length that the model reads. Its
arguments are a dictionary of arrays, which `params.safetensors` holds under the same names, and
int32 tokens [rows, length]; its result is float32 logits [rows, length, vocabulary].
`forward.mlir` is the same program as text, for tools that read no more than StableHLO.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import tree
from llama_jax.config import Compute, ModelConfig
from llama_jax.formats.atomic import atomic_folder
from llama_jax.formats.gather import check_params, fetch, is_plain
from llama_jax.formats.hf import float_dtype, write_descriptions
from llama_jax.formats.safetensors import TensorSpec, write_file
from llama_jax.model.transformer import forward

PROGRAM, TEXT, PARAMS, SIGNATURE = (
    "forward.stablehlo",
    "forward.mlir",
    "params.safetensors",
    "signature.json",
)
PLATFORMS = ("cpu", "cuda", "tpu")
# A single token takes another way through the model, and so would be another program.
SHORTEST = 2


def save_stablehlo(
    folder: str | Path,
    config: ModelConfig,
    params: tree.Tree,
    *,
    tokenizer: Any = None,
    dtype: Any = None,
    merge: bool = False,
    overwrite: bool = False,
) -> list[Path]:
    """Writes the program, its arrays, the configuration and the tokenizer; returns the files.

    dtype: of the arrays; None keeps each one's own. Products are float32, and experts are computed
    densely, since sorting tokens is no part of a portable program.

    Raises ValueError for adapted or quantized weights unless `merge`, which writes the full
    matrices they stand for.
    """
    target = None if dtype is None else np.dtype(jnp.dtype(float_dtype(dtype)))
    leaves = check_params(config, params, merge=merge, target="a StableHLO export")
    fallback = np.dtype(jnp.dtype(config.dtype))
    specs = [
        TensorSpec(
            path,
            target or (np.dtype(leaf.dtype) if is_plain(leaf) else fallback),
            tuple(leaf.shape),
        )
        for path, leaf in sorted(leaves.items())
    ]
    exported = export_forward(config, specs)
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        write_descriptions(temporary, config, {spec.dtype.name for spec in specs}, tokenizer)
        (temporary / PROGRAM).write_bytes(exported.serialize())
        (temporary / TEXT).write_text(exported.mlir_module(), encoding="utf-8")
        write_file(
            temporary / PARAMS,
            specs,
            lambda spec: fetch(leaves[spec.name], (), dtype=spec.dtype, name=spec.name),
        )
        signature = json.dumps(_signature(config, specs, exported), indent=2)
        (temporary / SIGNATURE).write_text(signature + "\n", encoding="utf-8")
    return sorted(Path(folder).iterdir())


def export_forward(config: ModelConfig, specs: list[TensorSpec]) -> jax.export.Exported:
    """The program of `forward` over a flat dictionary of arrays, for every platform at once."""
    compute = Compute(moe="dense")

    @jax.jit
    def logits(params: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
        return forward(config, tree.unflatten(params), tokens, compute=compute)

    rows, length = jax.export.symbolic_shape(
        "rows, length",
        constraints=(f"length >= {SHORTEST}", f"length <= {config.max_position_embeddings}"),
    )
    arrays = {spec.name: jax.ShapeDtypeStruct(spec.shape, spec.dtype) for spec in specs}
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    return jax.export.export(logits, platforms=PLATFORMS)(arrays, tokens)


def _signature(
    config: ModelConfig, specs: list[TensorSpec], exported: jax.export.Exported
) -> dict[str, Any]:
    """What a caller must know; arguments in the order in which the program takes them."""
    lengths = [SHORTEST, config.max_position_embeddings]
    return {
        "arguments": [
            *(
                {"name": spec.name, "dtype": spec.dtype.name, "shape": list(spec.shape)}
                for spec in specs
            ),
            {"name": "tokens", "dtype": "int32", "shape": ["rows", "length"], "length": lengths},
        ],
        "result": {"dtype": "float32", "shape": ["rows", "length", config.vocab_size]},
        "platforms": list(exported.platforms),
        "calling_convention_version": exported.calling_convention_version,
    }
