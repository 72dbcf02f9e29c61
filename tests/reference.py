"""The same tiny models in transformers, which is what "exact" is measured against."""

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from llama_jax import tree
from llama_jax.config import ModelConfig
from llama_jax.weights.table import weight_table

_CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "mixtral": (MixtralConfig, MixtralForCausalLM),
}


def reference_config(config: ModelConfig):
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        fields = vars(config.rope_scaling)
        rope |= {name: value for name, value in fields.items() if value is not None}
    values = {
        name: getattr(config, name)
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            "rms_norm_eps",
            "tie_word_embeddings",
            "bos_token_id",
            "pad_token_id",
        )
    }
    values |= {"eos_token_id": list(config.eos_token_id), "rope_parameters": rope}
    if config.model_type == "llama":
        values |= {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    else:
        values["sliding_window"] = config.sliding_window
    if config.moe is not None:
        values |= vars(config.moe)
    return _CLASSES[config.model_type][0](**values, attn_implementation="eager")


def reference_model(config: ModelConfig, params) -> torch.nn.Module:
    """A transformers model that holds `params`, in float32 and eval mode."""
    model = _CLASSES[config.model_type][1](reference_config(config)).eval()
    leaves = tree.flatten(params)
    state: dict[str, torch.Tensor] = {}
    for path, row in weight_table(config).items():
        array = np.asarray(leaves[path]).astype(np.float32)
        for name, index in row.hf_names():
            state[name] = torch.from_numpy(np.array(array[index]))
    if config.moe is not None:
        _fuse_experts(config, state)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"} if config.tie_word_embeddings else not missing, (
        missing
    )
    return model


def _fuse_experts(config: ModelConfig, state: dict[str, torch.Tensor]) -> None:
    """transformers 5 holds experts as two stacked tensors; the files hold one per expert."""
    assert config.moe is not None
    for layer in range(config.num_hidden_layers):
        old = f"model.layers.{layer}.block_sparse_moe"
        new = f"model.layers.{layer}.mlp"

        def take(name, old=old):
            return [
                state.pop(f"{old}.experts.{e}.{name}.weight")
                for e in range(config.moe.num_local_experts)
            ]

        gate, down, up = take("w1"), take("w2"), take("w3")
        state[f"{new}.experts.gate_up_proj"] = torch.stack(
            [torch.cat(pair) for pair in zip(gate, up, strict=True)]
        )
        state[f"{new}.experts.down_proj"] = torch.stack(down)
        state[f"{new}.gate.weight"] = state.pop(f"{old}.gate.weight")


def reference_logits(model: torch.nn.Module, tokens: np.ndarray, **kwargs) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(tokens).long(), **kwargs).logits.float().numpy()
