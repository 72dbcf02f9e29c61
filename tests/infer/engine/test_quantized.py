"""Every way of storing weights is served with the tokens of the offline generator."""

import pytest

from infer.engine.engine import BatchingEngine
from infer.engine.options import EngineOptions
from infer.engine.request import Request
from infer.generate import generate
from infer.params import SamplingParams
from llama_jax import tree
from llama_jax.config import Compute
from llama_jax.formats.gguf import load_gguf, save_gguf
from llama_jax.weights.calibrate import calibrate
from llama_jax.weights.qat_tree import add_qat, convert_qat
from llama_jax.weights.quantize import quantize, stored_types
from tests.infer.engine.client import ask
from tests.infer.engine.test_engine import prompts_of
from tests.tiny import FAMILIES, tiny_config, tiny_params, tiny_tokens

pytestmark = pytest.mark.compiled_quickly

OPTIONS = EngineOptions(max_slots=2, block_size=16, piece_tokens=32)
CONFIG = tiny_config(num_hidden_layers=1, eos_token_id=())


def _quantized(scheme, **options):
    def make(config, params, tmp_path):
        peaks = None
        if scheme.endswith("static"):
            peaks = calibrate(config, params, list(tiny_tokens(2, 16)), compute=Compute())
        return quantize(config, params, scheme=scheme, peaks=peaks, **options)

    return make


def _trained(config, params, tmp_path):
    return convert_qat(
        add_qat(config, params, bits=4, backward="straight_through", skip=("role:embedding",))
    )


def _imported(config, params, tmp_path):
    file = save_gguf(tmp_path / "m.gguf", config, params, None, dtype="q4_0", overwrite=True)
    return load_gguf(file)[1]


KINDS = {
    "int8 embedding and head too": _quantized("int8", skip=()),
    "int8 tiles": _quantized("int8", tile=16),
    "fp8": _quantized("fp8"),
    "int4": _quantized("int4"),
    "nf4 double": _quantized("nf4", double=True, tile=16),
    "int8-dynamic": _quantized("int8-dynamic", skip=()),
    "int8-static": _quantized("int8-static"),
    "int4-static": _quantized("int4-static"),
    "qat": _trained,
    "gguf q4_0": _imported,
}


def served_alike(config, params):
    model = config, params, None
    engine = BatchingEngine(model, OPTIONS)
    engine.start()
    greedy, seeded = SamplingParams(temperature=0, max_tokens=12), SamplingParams(seed=3)
    wishes = [greedy, seeded.replace(max_tokens=12)]
    prompts = prompts_of(5, 40)
    requests = [Request(f"{n}", p, w) for n, (p, w) in enumerate(zip(prompts, wishes, strict=True))]
    together = [answer.token_ids() for answer in ask(engine, *requests)]
    alone = [ask(engine, request)[0].token_ids() for request in requests]
    statistics = engine.statistics()
    engine.stop(0)
    outputs = generate(model, [list(prompt) for prompt in prompts], wishes)
    wanted = [output.token_ids for output in outputs]
    assert together == alone == wanted
    assert statistics["compilations_total"] == 0 and statistics["prefix_hit_tokens_total"] > 0


# A kind for each matrix, so that few models show them all.
MODELS = {
    "weights alone": {
        "embed_tokens": "int8 embedding and head too",
        "q_proj": "int8 tiles",
        "k_proj": "fp8",
        "v_proj": "int4",
        "o_proj": "nf4 double",
        "gate_proj": "gguf q4_0",
        "lm_head": "int8 embedding and head too",
    },
    "activations too": {
        "embed_tokens": "int8-dynamic",
        "q_proj": "int8-dynamic",
        "k_proj": "int4-static",
        "v_proj": "int8-static",
        "o_proj": "qat",
        "down_proj": "int4-static",
        "lm_head": "int8-dynamic",
    },
}
STORED = {
    "weights alone": "float8_e4m3fn, int4, int8, nf4",
    "activations too": "int4-dynamic, int4-static, int8-dynamic, int8-static",
}


@pytest.mark.parametrize("name", MODELS)
def test_quantized_models_are_served(tmp_path, name):
    params = tiny_params(CONFIG)
    leaves = tree.flatten(params)
    for module, kind in MODELS[name].items():
        quantized = tree.flatten(KINDS[kind](CONFIG, params, tmp_path))
        for path in leaves:
            if module in path:
                leaves[path] = quantized[path]
    params = tree.unflatten(leaves)
    assert stored_types(params) == STORED[name]
    served_alike(CONFIG, params)


def test_quantized_experts_are_served():
    config = FAMILIES["mixtral"].replace(eos_token_id=(), num_hidden_layers=1)
    served_alike(config, quantize(config, tiny_params(config), scheme="nf4"))
