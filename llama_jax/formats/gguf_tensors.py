"""Which tensors of a GGUF file hold which weights: names, shapes, and the order of rows."""

from collections.abc import Iterator

from llama_jax.config import ModelConfig
from llama_jax.formats.gguf_reader import GGUFFile
from llama_jax.formats.gguf_rope import FACTORS_TENSOR
from llama_jax.weights.table import Weight, weight_table

# Module name -> GGUF's, without the `blk.N.` of a layer.
_NAMES = {
    "embed_tokens": "token_embd",
    "layers.input_layernorm": "attn_norm",
    "layers.self_attn.q_proj": "attn_q",
    "layers.self_attn.k_proj": "attn_k",
    "layers.self_attn.v_proj": "attn_v",
    "layers.self_attn.o_proj": "attn_output",
    "layers.post_attention_layernorm": "ffn_norm",
    "layers.mlp.gate_proj": "ffn_gate",
    "layers.mlp.up_proj": "ffn_up",
    "layers.mlp.down_proj": "ffn_down",
    "layers.block_sparse_moe.gate": "ffn_gate_inp",
    "layers.block_sparse_moe.experts.w1": "ffn_gate_exps",
    "layers.block_sparse_moe.experts.w2": "ffn_down_exps",
    "layers.block_sparse_moe.experts.w3": "ffn_up_exps",
    "norm": "output_norm",
    "lm_head": "output",
}

_MAX_LISTED = 12


def gguf_name(row: Weight, layer: int | None) -> str:
    """The tensor that holds a row of the weight table, of one layer where layers are stacked."""
    module, _, suffix = row.path.rpartition(".")
    prefix = "" if layer is None else f"blk.{layer}."
    return f"{prefix}{_NAMES[module]}.{suffix}"


def is_expert(row: Weight) -> bool:
    """Whether the tensors hold one matrix for each expert."""
    return "{expert}" in row.hf_name


def heads(config: ModelConfig, row: Weight) -> int | None:
    """The number of heads whose rows are in Meta's order in the file; None for other weights."""
    if ".q_proj." in row.path:
        return config.num_attention_heads
    return config.num_key_value_heads if ".k_proj." in row.path else None


def single_expert(name: str, expert: int) -> str:
    """The older layout has a tensor for each: blk.0.ffn_up_exps.weight -> blk.0.ffn_up.3.weight."""
    return name.replace("_exps.", f".{expert}.")


def _expected(file: GGUFFile, config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor the file must hold."""
    for row in weight_table(config).values():
        if not row.path.startswith("layers."):
            yield gguf_name(row, None), row.shape
            continue
        for layer in range(row.shape[0]):
            name = gguf_name(row, layer)
            if is_expert(row) and name not in file.tensors:
                for expert in range(row.shape[1]):
                    if (single := single_expert(name, expert)) not in file.tensors:
                        break
                    yield single, row.shape[2:]
                else:
                    continue
            yield name, row.shape[1:]
    if FACTORS_TENSOR in file.tensors:
        yield FACTORS_TENSOR, (config.head_dim // 2,)


def check_tensors(file: GGUFFile, config: ModelConfig) -> None:
    """Raises ValueError for every tensor that is missing, unexpected or of the wrong shape."""
    expected = dict(_expected(file, config))
    missing = [name for name in expected if name not in file.tensors]
    unexpected = [name for name in file.tensors if name not in expected]
    shapes = [
        f"{name} has shape {file.tensors[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in file.tensors and file.tensors[name].shape != shape
    ]
    problems = [
        f"{title}: {', '.join(names[:_MAX_LISTED])}"
        + (f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else "")
        for title, names in (
            ("missing tensors", missing),
            ("unexpected tensors", unexpected),
            ("wrong shapes", shapes),
        )
        if names
    ]
    if problems:
        raise ValueError("; ".join(problems))
