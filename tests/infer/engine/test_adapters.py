"""Adapters side by side: each row as if its adapter were the only one."""

import dataclasses

import jax
import pytest

from infer.engine.engine import BatchingEngine
from infer.engine.options import EngineOptions
from infer.engine.request import Request
from infer.generate import generate
from infer.params import SamplingParams
from llama_jax import tree
from llama_jax.formats.peft import load_adapter, save_adapter
from llama_jax.model.layout import unstack_layers
from llama_jax.weights.adapted import LoraTensor
from llama_jax.weights.lora import add_lora
from llama_jax.weights.lora_config import LoraConfig
from tests.infer.engine.client import ask, submit
from tests.infer.engine.test_engine import prompts_of
from tests.infer.engine.test_pages import on_mesh
from tests.tiny import FAMILIES, tiny_params

pytestmark = pytest.mark.compiled_quickly

OPTIONS = EngineOptions(
    max_slots=4, block_size=16, piece_tokens=32, max_adapters=2, max_lora_rank=4
)
GREEDY = SamplingParams(temperature=0, max_tokens=16)
CONFIG = FAMILIES["llama-biases"].replace(eos_token_id=())


def write_adapter(folder, params, *, seed, rank, modules, config=CONFIG):
    lora = LoraConfig(r=rank, lora_alpha=16, target_modules=modules)
    adapted = add_lora(config, params, lora, jax.random.key(seed))

    def trained(path, leaf):
        if not isinstance(leaf, LoraTensor):
            return leaf
        noise = 0.3 * jax.random.normal(jax.random.key(seed), leaf.lora_b.shape)
        return LoraTensor(leaf.base, leaf.lora_a, noise, leaf.scale, leaf.ranks)

    adapted = tree.map_with_path(trained, adapted)
    save_adapter(folder, config, adapted, base_model_name_or_path=None)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, params = tmp_path_factory.mktemp("adapters"), tiny_params(CONFIG)
    return {
        "a": write_adapter(root / "a", params, seed=1, rank=4, modules=["q_proj", "down_proj"]),
        "b": write_adapter(root / "b", params, seed=2, rank=2, modules="all-linear"),
        "large": write_adapter(root / "large", params, seed=3, rank=8, modules=["q_proj"]),
        "head": write_adapter(root / "head", params, seed=4, rank=2, modules=["lm_head"]),
    }


@pytest.fixture(scope="module")
def engine(folders):
    engine = BatchingEngine((CONFIG, tiny_params(CONFIG), None), OPTIONS)
    engine.start()
    engine.add_adapter("a", folders["a"])
    engine.add_adapter("b", folders["b"])
    yield engine
    engine.stop(0)


def request(name, prompt, adapter, params=GREEDY):
    return Request(name, prompt, params, adapter=adapter)


def test_rows_with_different_adapters_share_a_batch(engine, folders):  # R105
    params = tiny_params(CONFIG)
    (prompt,) = prompts_of(60)
    names = (None, "a", "b", "a")
    first = ask(engine, *(request(f"{n}", prompt, name) for n, name in enumerate(names)))
    again = ask(engine, *(request(f"{n}", prompt, name) for n, name in enumerate(names)))
    for name, answer, hot in zip(names, first, again, strict=True):
        adapted = params if name is None else load_adapter(folders[name], CONFIG, params)
        wanted = generate((CONFIG, adapted, None), [list(prompt)], GREEDY)[0]
        assert answer.token_ids() == hot.token_ids() == wanted.token_ids
        assert hot.start.cached_tokens == 48
    assert len({tuple(answer.token_ids()) for answer in first}) == 3
    assert engine.statistics()["compilations_total"] == 0


def test_pages_serve_them_too(engine, folders):
    options = dataclasses.replace(OPTIONS, cache="pages", max_slots=2, piece_tokens=16)
    pages = BatchingEngine((CONFIG, tiny_params(CONFIG), None), options)
    pages.start()
    pages.add_adapter("b", folders["b"])
    (prompt,) = prompts_of(60)
    requests = [request(f"{name}", prompt, name) for name in (None, "b")]
    wanted = [answer.token_ids() for answer in ask(engine, *requests)]
    assert wanted == [answer.token_ids() for answer in ask(pages, *requests)]
    assert wanted[0] != wanted[1]
    pages.stop(0)


def test_a_mesh_serves_them_too(engine, folders):
    """Each device has a part of every matrix, and the same part of what lies beside it."""
    model, mesh = on_mesh((CONFIG, tiny_params(CONFIG), None), tensor=2, fsdp=2)
    options = dataclasses.replace(OPTIONS, piece_tokens=16)
    divided = BatchingEngine(model, options, mesh=mesh)
    divided.start()
    divided.add_adapter("a", folders["a"])
    divided.add_adapter("b", folders["b"])
    beside = divided._runner.params["layers"]["self_attn"]
    shapes = [beside[name]["weight"].lora_b.shape for name in ("q_proj", "o_proj")]
    shards = [beside[name]["weight"].lora_b.addressable_shards for name in ("q_proj", "o_proj")]
    assert {shard.data.shape[2] for shard in shards[0]} == {shapes[0][2] // 4}
    assert {shard.data.shape[2] for shard in shards[1]} == {shapes[1][2]}
    (prompt,) = prompts_of(60)
    requests = [request(f"{name}", prompt, name) for name in (None, "a", "b")]
    wanted = [answer.token_ids() for answer in ask(engine, *requests)]
    assert wanted == [answer.token_ids() for answer in ask(divided, *requests)]
    assert len(set(map(tuple, wanted))) == 3
    divided.remove_adapter("a")
    divided.add_adapter("other", folders["b"])
    (answer,) = ask(divided, request("other", prompt, "other"))
    assert answer.token_ids() == wanted[2]
    assert divided.statistics()["compilations_total"] == 0
    divided.stop(0)


def test_split_layers_on_a_mesh_are_refused():
    (config, params, _), mesh = on_mesh((CONFIG, tiny_params(CONFIG), None), tensor=2)
    split = unstack_layers(params)
    with pytest.raises(ValueError, match="on a mesh adapters lie beside stacked ones"):
        BatchingEngine((config, split, None), OPTIONS, mesh=mesh)


def test_adapters_come_and_go_while_others_run(engine, folders):
    (prompt,) = prompts_of(40, seed=3)
    with pytest.raises(ValueError, match="2 adapters are loaded, as many as may"):
        engine.add_adapter("c", folders["a"])
    with pytest.raises(ValueError, match="an adapter 'a' is loaded"):
        engine.add_adapter("a", folders["b"])
    (before,) = ask(engine, request("before", prompt, "a"))
    running = submit(engine, request("running", prompt, "a", GREEDY.replace(max_tokens=100)))
    assert running.started.wait(60)
    engine.remove_adapter("a")
    assert running.ended.is_set() and len(running.token_ids()) == 100
    with pytest.raises(ValueError, match="no adapter 'a'; loaded are 'b'"):
        engine.submit(request("x", prompt, "a"), print)
    with pytest.raises(ValueError, match="no adapter 'a'"):
        engine.remove_adapter("a")
    # The same name for other weights finds nothing in the cache that is not its own.
    engine.add_adapter("a", folders["b"])
    b, other = ask(engine, request("b", prompt, "b"), request("other", prompt, "a"))
    assert other.start.cached_tokens == 0
    assert other.token_ids() == b.token_ids() != before.token_ids()
    engine.remove_adapter("a")
    engine.add_adapter("a", folders["a"])
    assert ask(engine, request("after", prompt, "a"))[0].token_ids() == before.token_ids()


@pytest.mark.parametrize(
    "name, message", [("large", "rank is 8, but max_lora_rank is 4"), ("head", "lm_head")]
)
def test_an_adapter_that_cannot_be_served_is_refused(engine, folders, name, message):
    with pytest.raises(ValueError, match=message):
        engine.add_adapter(name, folders[name])
    assert engine.state == "ready"


def test_an_engine_without_room_for_adapters_says_so(folders):
    engine = BatchingEngine((CONFIG, tiny_params(CONFIG), None), EngineOptions(max_slots=2))
    with pytest.raises(ValueError, match="max_adapters"):
        engine.add_adapter("a", folders["a"])
