"""A checkpoint of the first release, against the numbers it was made from: they are drawn again, by
the compiler that users have, because the last bits of a normal number follow from it."""

from pathlib import Path

import jax
import jax.numpy as jnp

from llama_jax.formats import checkpoint
from llama_jax.weights.lora import add_lora
from llama_jax.weights.lora_config import LoraConfig
from tests.formats.test_checkpoint import same
from tests.tiny import tiny_params


def test_r62_it_is_read():
    """`data/checkpoint_v1` was written before saves went to the background, through another API
    of orbax; it holds what this says."""
    folder = Path(__file__).parent / "data" / "checkpoint_v1" / "step_00000003"
    config, params = checkpoint.load_model(folder)
    assert config.hidden_size == 8 and checkpoint.read_abstract(folder)[0] == config
    plain = tiny_params(config)
    lora = add_lora(config, plain, LoraConfig(r=2), jax.random.key(0))
    same(params, lora)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    optimizer = {"moments": {"a": jnp.arange(6.0)}, "step": jnp.int32(3)}
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), (params, optimizer)
    )
    restored = checkpoint.restore_train_state(folder, params=wanted[0], optimizer=wanted[1])
    same(restored[:2], (params, optimizer))
    assert restored[2] == {"data": {"next_index": 3}, "counters": {}, "step": 3}
