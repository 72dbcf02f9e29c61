"""cuDNN's attention without a GPU: what is asked of JAX equals the reference, computed by XLA, and
becomes cuDNN's calls in a program for CUDA. What cuDNN computes is not seen here."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from llama_jax.config import DEFAULT_RULES, Compute
from llama_jax.kernels import cudnn
from llama_jax.kernels.platforms import check_kernels
from llama_jax.mesh.sharding import make_mesh
from llama_jax.model import transformer
from tests.kernels.test_splash import LENGTH, SEGMENTS, operands, reference
from tests.tiny import FAMILIES, tiny_config, tiny_params, tiny_tokens

pytestmark = pytest.mark.compiled_quickly

BFLOAT16 = dataclasses.replace(Compute(), dtype="bfloat16", attention="cudnn")


def run(q, k, v, *, segment_ids=None, window=None, implementation="cudnn"):
    return cudnn.attend(
        q,
        k,
        v,
        segment_ids,
        sliding_window=window,
        rules=DEFAULT_RULES,
        implementation=implementation,
    )


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("segments", [None, SEGMENTS])
def test_what_is_asked_equals_the_reference_forward_and_backward(window, segments):
    arrays = operands(size=64)
    ids = None if segments is None else jnp.asarray(segments)
    ours = functools.partial(run, segment_ids=ids, window=window, implementation="xla")
    np.testing.assert_allclose(ours(*arrays), reference(*arrays, ids, window), atol=2e-5)

    def gradients(attend):
        return jax.grad(lambda *arrays: jnp.sum(jnp.sin(attend(*arrays))), argnums=(0, 1, 2))

    expected = gradients(lambda q, k, v: reference(q, k, v, ids, window))(*arrays)
    for a, b in zip(gradients(ours)(*arrays), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """What JAX asks the driver before it writes a call of cuDNN."""
    answers = {
        "check_cudnn_version": lambda: 91300,
        "check_compute_capability": lambda capability: True,
        "is_cuda_compute_capability_equal": lambda capability: False,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(fused_attention_stablehlo, name, answer)


def for_cuda(function, *arguments):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("packed", [False, True])
def test_a_step_for_cuda_calls_cudnn_forward_and_backward(pretended_gpu, packed):
    config = tiny_config(model_type="mistral", num_hidden_layers=1, sliding_window=9)
    params, tokens = tiny_params(config), tiny_tokens(2, LENGTH)
    segments = jnp.asarray(SEGMENTS) if packed else None

    def loss(params):
        return jnp.sum(
            transformer.forward(config, params, tokens, compute=BFLOAT16, segment_ids=segments)
        )

    program = for_cuda(jax.grad(loss), params)
    kind = "ScaleBiasSoftmax" if packed else "Softmax"
    assert program.count(f"@__cudnn$fmha{kind}(") == 1
    assert program.count(f"@__cudnn$fmha{kind}Backward(") == 1
    assert "\\22mask_type\\22: \\22CAUSAL\\22" in program
    assert "\\22sliding_window_length\\22: 9" in program


def test_the_model_takes_the_kernel_when_told(monkeypatch):
    calls = []

    def without_a_gpu(*args, attend=cudnn.attend, **kwargs):
        calls.append(args)
        with jax.numpy_dtype_promotion("standard"):  # what JAX writes for XLA promotes
            return attend(*args, **kwargs, implementation="xla")

    monkeypatch.setattr(cudnn, "attend", without_a_gpu)
    config = tiny_config(num_hidden_layers=1)
    params, tokens = tiny_params(config), tiny_tokens(2, LENGTH)
    got = transformer.forward(config, params, tokens, compute=BFLOAT16)
    plain = transformer.forward(
        config, params, tokens, compute=dataclasses.replace(BFLOAT16, attention="reference")
    )
    assert calls
    np.testing.assert_allclose(got, plain, atol=0.05)


def test_what_cudnn_does_not_take_is_refused():
    narrow = jnp.ones((1, LENGTH, 2, 12), jnp.bfloat16)
    with pytest.raises(ValueError, match="multiple of 8, not 12; set compute.attention to ref"):
        run(narrow, narrow, narrow)
    odd = jnp.ones((1, 33, 2, 16), jnp.bfloat16)
    with pytest.raises(ValueError, match="multiple of 2, not 33"):
        run(odd, odd, odd, segment_ids=jnp.ones((1, 33), jnp.int32))
    whole = jnp.ones((2, LENGTH, 2, 16), jnp.bfloat16)
    with (
        jax.set_mesh(make_mesh({"context": 2, "fsdp": 4})),
        pytest.raises(ValueError, match="needs whole sequences, which mesh.context divides"),
    ):
        jax.jit(run).lower(whole, whole, whole)
    with pytest.raises(ValueError, match="computes in bfloat16 and float16, but compute.dtype is"):
        Compute(attention="cudnn")


@pytest.mark.parametrize(
    ("field", "kernel", "platform", "instead"),
    [
        ("attention", "splash", "cpu", "reference"),
        ("attention", "splash", "gpu", "reference"),
        ("attention", "cudnn", "tpu", "reference"),
        ("moe", "megablox", "cpu", "grouped"),
    ],
)
def test_a_kernel_of_another_platform_is_refused(field, kernel, platform, instead):
    compute = dataclasses.replace(Compute(dtype="bfloat16"), **{field: kernel})
    config = FAMILIES["mixtral"]
    wanted = f"compute.{field} is {kernel}, a kernel for .*{platform} devices; .* to {instead}$"
    with pytest.raises(ValueError, match=wanted):
        check_kernels(compute, config, platform)


def test_kernels_run_on_their_platform_and_products_of_experts_only_matter_with_some():
    check_kernels(dataclasses.replace(Compute(), attention="splash"), tiny_config(), "tpu")
    check_kernels(BFLOAT16, tiny_config(), "gpu")
    check_kernels(dataclasses.replace(Compute(), moe="megablox"), tiny_config(), "cpu")
