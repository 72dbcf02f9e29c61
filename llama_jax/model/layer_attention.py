"""The attention of a layer, by what holds keys and values for it: nothing, rows, slots or pages."""

from typing import Any

import jax

from llama_jax.config import Compute, ModelConfig
from llama_jax.kernels import cudnn, splash
from llama_jax.mesh.sequence import gather_keys, length_parts
from llama_jax.model import cache as kv
from llama_jax.model.attention import attend
from llama_jax.model.context import Context
from llama_jax.model.paged_cache import PagedCache, attend_pages
from llama_jax.model.slot_cache import attend_slots

# Of one layer: nothing, keys and values, or all pages.
LayerCache = Any

_KERNELS: dict[str, Any] = {"splash": splash, "cudnn": cudnn}  # for whole sequences


def attend_in_layer(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    context: Context,
    layer_cache: LayerCache,
    *,
    config: ModelConfig,
    compute: Compute,
) -> tuple[jax.Array, LayerCache]:
    """query [B, T, N, H], key and value [B, T, K, H] of the new tokens, rotated -> (mixed values
    [B, T, N, H], the cache with the new ones in it)."""
    window, rules = config.sliding_window, compute.rules
    if isinstance(layer_cache, PagedCache):
        return attend_pages(query, key, value, layer_cache, sliding_window=window, rules=rules)
    if context.rows is not None:
        assert layer_cache is not None
        return attend_slots(query, key, value, layer_cache, context.rows, sliding_window=window)
    if layer_cache is None and compute.attention in _KERNELS:
        kernel, segments = _KERNELS[compute.attention], context.segment_ids
        mixed = kernel.attend(query, key, value, segments, sliding_window=window, rules=rules)
        return mixed, None
    is_divided = length_parts(rules) > 1
    keys: kv.Held
    values: kv.Held
    if layer_cache is None:
        if is_divided:
            key, value = (gather_keys(x, "kv_heads", rules) for x in (key, value))
        keys, values = key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3)
    else:
        assert context.cursor is not None
        keys = kv.write_keys(layer_cache[0], key, context.cursor)
        values = kv.write_values(layer_cache[1], value, context.cursor)
        layer_cache = (keys, values)
        visible = context.mask.shape[-1]
        keys, values = keys[..., :visible], values[..., :visible, :]
    mixed = attend(query, keys, values, context.mask, is_divided=is_divided)
    return mixed, layer_cache
