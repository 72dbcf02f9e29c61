"""The compiled steps of the engine, of fixed shapes: read a piece of a prompt, run a token of every
row, choose tokens, and move keys and values between slots and blocks.

Module-level jitted functions, so that engines in a process share their compilations. Caches, blocks
and the memory of seen tokens are donated: updated in place.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from infer import steps as offline
from infer.engine.adapters import with_chosen
from infer.sampling import Needs, Rows, Sampled, Seen, sample
from infer.steps import Rules
from llama_jax.config import Compute, ModelConfig
from llama_jax.kernels.rounded import Held
from llama_jax.mesh.sharding import whole
from llama_jax.model import slot_cache, transformer
from llama_jax.model.cache import NEVER
from llama_jax.model.slot_cache import SlotCache, SlotRows

Blocks = list[tuple[Held, Held]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Memory:
    """What slots remember for editing logits: the tokens seen, and the biases asked for."""

    seen: Seen
    bias: Float[Array, "N V"]


@partial(jax.jit, static_argnames=("config", "num_slots", "capacity", "dtype"))
def new_cache(config: ModelConfig, *, num_slots: int, capacity: int, dtype: str) -> SlotCache:
    return slot_cache.init_slot_cache(config, num_slots, capacity, dtype=dtype)


@partial(jax.jit, static_argnames=("config", "num_blocks", "block_size", "dtype"))
def new_blocks(config: ModelConfig, *, num_blocks: int, block_size: int, dtype: str) -> Blocks:
    return slot_cache.init_blocks(config, num_blocks, block_size, dtype=dtype)


@partial(jax.jit, static_argnames=("num_slots", "vocab_size"))
def new_memory(*, num_slots: int, vocab_size: int) -> Memory:
    shape = (num_slots, vocab_size)
    return Memory(
        Seen(jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32)), jnp.zeros(shape, jnp.float32)
    )


@partial(jax.jit, static_argnames=("config", "compute"), donate_argnames=("cache",))
def read_piece(
    config: ModelConfig,
    params: Any,
    cache: SlotCache,
    tokens: Int[Array, " T"],
    slot: Int[Array, ""],
    begin: Int[Array, ""],
    num_real: Int[Array, ""],
    adapter: Int[Array, ""],
    *,
    compute: Compute,
) -> tuple[SlotCache, Float[Array, "T D"], Float[Array, " D"]]:
    """Runs tokens at positions begin, … of a slot, of which the first num_real are real.

    Gives the final states, and the sum of the real ones in float32.
    """
    rows = SlotRows(slot, (begin + places_of(tokens))[None], begin + num_real)
    cache = dataclasses.replace(cache, rows=rows)
    return piece_of(config, params, cache, tokens, num_real, adapter, compute=compute)


@partial(jax.jit, static_argnames=("config", "compute"), donate_argnames=("cache",))
def run_tokens(
    config: ModelConfig,
    params: Any,
    cache: SlotCache,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    visible: Int[Array, ""],
    adapters: Int[Array, " B"],
    *,
    compute: Compute,
) -> tuple[SlotCache, Float[Array, "BT V"]]:
    """Runs tokens of the first B slots, each with its adapter (negative: none); logits after
    each."""
    cache = dataclasses.replace(cache, rows=SlotRows(jnp.int32(0), positions, visible))
    return logits_of(config, params, cache, tokens, adapters, compute=compute)


# What is the same for slots and for pages: `cache` knows its rows.


def places_of(tokens: Int[Array, " T"]) -> Int[Array, " T"]:
    return jnp.arange(tokens.shape[0], dtype=jnp.int32)


def piece_of(
    config: ModelConfig,
    params: Any,
    cache: Any,
    tokens: Int[Array, " T"],
    num_real: Int[Array, ""],
    adapter: Int[Array, ""],
    *,
    compute: Compute,
) -> tuple[Any, Float[Array, "T D"], Float[Array, " D"]]:
    """(cache, states, sum of the real ones) of a piece of one row."""
    params = with_chosen(params, adapter[None], length=tokens.shape[0])
    hidden, after, _ = transformer.hidden_states(
        config, params, tokens[None], compute=compute, cache=cache
    )
    real = (places_of(tokens) < num_real)[:, None]
    total = jnp.where(real, hidden[0].astype(jnp.float32), 0.0).sum(axis=0)
    return dataclasses.replace(after, rows=None), hidden[0], whole(total)


def logits_of(
    config: ModelConfig,
    params: Any,
    cache: Any,
    tokens: Int[Array, "B T"],
    adapters: Int[Array, " B"],
    *,
    compute: Compute,
) -> tuple[Any, Float[Array, "BT V"]]:
    """(cache, logits) after each token of each row."""
    params = with_chosen(params, adapters, length=tokens.shape[1])
    hidden, after, _ = transformer.hidden_states(
        config, params, tokens, compute=compute, cache=cache
    )
    flat = hidden.reshape(-1, hidden.shape[-1])
    logits = transformer.logits(config, params, flat, compute=compute)
    return dataclasses.replace(after, rows=None), logits


@partial(
    jax.jit,
    static_argnames=("config", "compute", "num", "needs", "vocab_size"),
    donate_argnames=("cache",),
)
def propose(
    config: ModelConfig,
    params: Any,
    cache: SlotCache,
    tokens: Int[Array, "B 2"],
    positions: Int[Array, "B 2"],
    visible: Int[Array, ""],
    rows: Rows,
    rules: Rules,
    step: Int[Array, " B"],
    *,
    compute: Compute,
    num: int,
    needs: Needs,
    vocab_size: int,
) -> tuple[SlotCache, Int[Array, "B N"]]:
    """Up to `num` tokens that a small model would take after the last two of each of the first B
    slots, negative from where it cannot choose. It draws as `take` does for the same row and step,
    with the same random numbers: where both models believe alike, they take the same token.

    vocab_size: of the model that is guessed. Two tokens are read, because the last guess of the
    step before was never read.
    """

    def one(cache: SlotCache, ids: jax.Array, places: jax.Array, seen: jax.Array) -> Any:
        at = SlotRows(jnp.int32(0), places, seen)
        hidden, after, _ = transformer.hidden_states(
            config,
            params,
            jnp.clip(ids, 0, config.vocab_size - 1),
            compute=compute,
            cache=dataclasses.replace(cache, rows=at),
        )
        logits = transformer.logits(config, params, hidden[:, -1], compute=compute)
        more = max(vocab_size - config.vocab_size, 0)
        logits = jnp.pad(logits, ((0, 0), (0, more)), constant_values=-jnp.inf)[:, :vocab_size]
        return dataclasses.replace(after, rows=None), logits

    def choose(logits: jax.Array, step: jax.Array) -> jax.Array:
        sampled = sample(
            logits,
            rows,
            step=step,
            needs=needs,
            seen=None,
            allowed=rules.allowed,
            end_tokens=rules.end_tokens,
        )
        return sampled.tokens

    def body(carry: Any, number: jax.Array) -> Any:
        cache, ids, places, seen = carry
        places = jnp.minimum(places, NEVER - 1) + 1  # of rows that fill the step up it stays NEVER
        cache, logits = one(cache, ids[:, None], places[:, None], seen + 1)
        ids = choose(logits, step + number)
        return (cache, ids, places, seen + 1), ids

    cache, logits = one(cache, tokens, positions, visible)
    first = choose(logits, step)
    begin: Any = cache, first, positions[:, -1], visible
    (cache, *_), others = jax.lax.scan(body, begin, jnp.arange(1, num))
    return cache, jnp.concatenate([first[None], others]).T


@partial(jax.jit, static_argnames=("config", "compute"))
def logits_at(
    config: ModelConfig,
    params: Any,
    hidden: Float[Array, "T D"],
    place: Int[Array, ""],
    *,
    compute: Compute,
) -> Float[Array, "2 V"]:
    """Logits of one state, twice: products of a single row are slow on a CPU in narrow types."""
    state = jax.lax.dynamic_index_in_dim(hidden, place, 0)
    return transformer.logits(config, params, jnp.tile(state, (2, 1)), compute=compute)


@partial(jax.jit, static_argnames=("config", "compute", "num"))
def score(
    config: ModelConfig,
    params: Any,
    hidden: Float[Array, "T D"],
    targets: Int[Array, " T"],
    *,
    compute: Compute,
    num: int,
) -> tuple[Float[Array, " T"], Float[Array, "T K"], Int[Array, "T K"]]:
    """Log probability of targets[t] after state t, and of the `num` most likely tokens."""
    scored = offline.score(config, params, hidden[None], targets[None], compute=compute, num=num)
    chosen, top, ids = whole([each[0] for each in scored])
    return chosen, top, ids


@partial(jax.jit, static_argnames=("needs",), donate_argnames=("memory",))
def take(
    logits: Float[Array, "B V"],
    memory: Memory | None,
    slots: Int[Array, " B"],
    masks: UInt32[Array, "B W"] | None,
    rows: Rows,
    rules: Rules,
    step: Int[Array, " B"],
    *,
    needs: Needs,
) -> tuple[Sampled, Memory | None]:
    """The next token of each row. memory and masks are given when `needs.edit`: the memory of all
    slots, of which row b is slots[b] (beyond the last: none), and a bit for each token that a
    row's structure allows, the lowest bit of a word first."""
    seen = None
    if needs.edit:
        assert memory is not None and masks is not None
        seen = jax.tree.map(lambda each: each[slots], memory.seen)
        bits = masks[:, :, None] >> jnp.arange(32, dtype=jnp.uint32) & 1
        fits = bits.reshape(masks.shape[0], -1)[:, : logits.shape[-1]] > 0
        rows = dataclasses.replace(rows, bias=jnp.where(fits, memory.bias[slots], -jnp.inf))
    sampled = sample(
        logits,
        rows,
        step=step,
        needs=needs,
        seen=seen,
        allowed=rules.allowed,
        end_tokens=rules.end_tokens,
    )
    if memory is not None:
        output = memory.seen.output.at[slots, sampled.tokens].add(1, mode="drop")
        memory = dataclasses.replace(memory, seen=dataclasses.replace(memory.seen, output=output))
    return whole(sampled), memory


gathered = jax.jit(whole)


@partial(jax.jit, donate_argnames=("memory",))
def remember(
    memory: Memory,
    slot: Int[Array, ""],
    tokens: Int[Array, " S"],
    num_prompt: Int[Array, ""],
    num_all: Int[Array, ""],
    bias: Float[Array, " V"],
) -> Memory:
    """Begins a slot's memory: `num_prompt` tokens of a prompt, the others up to `num_all` of an
    answer."""
    vocab_size = bias.shape[0]
    places = jnp.arange(tokens.shape[0])
    in_prompt = jnp.zeros(vocab_size, bool).at[tokens].max(places < num_prompt)
    counted = ((places >= num_prompt) & (places < num_all)).astype(jnp.int32)
    output = jnp.zeros(vocab_size, jnp.int32).at[tokens].add(counted)
    seen = Seen(memory.seen.prompt.at[slot].set(in_prompt), memory.seen.output.at[slot].set(output))
    return Memory(seen, memory.bias.at[slot].set(bias))


@partial(jax.jit, donate_argnames=("cache",))
def copy_slot(cache: SlotCache, source: Int[Array, ""], target: Int[Array, ""]) -> SlotCache:
    return slot_cache.copy_slot(cache, source, target)


@partial(jax.jit, donate_argnames=("memory",))
def copy_memory(memory: Memory, source: Int[Array, ""], target: Int[Array, ""]) -> Memory:
    return jax.tree.map(lambda each: each.at[target].set(each[source]), memory)


clear_slot = jax.jit(slot_cache.clear_slot, donate_argnums=0)
read_slot = jax.jit(slot_cache.read_slot)
write_slot = jax.jit(slot_cache.write_slot, donate_argnums=0)
save_blocks = jax.jit(slot_cache.save_blocks, donate_argnums=0)
load_blocks = jax.jit(slot_cache.load_blocks, donate_argnums=0)
