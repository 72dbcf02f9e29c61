"""Eight emulated CPU devices and strict promotion, before JAX wakes up."""

import gc
import os
from collections.abc import Iterator

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Emulated devices share few cores: on a busy machine one may be late to a collective by more than
# the 40 seconds after which XLA ends the process.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
        "--xla_cpu_collective_call_terminate_timeout_seconds=1200",
    ]
).strip()

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_module() -> Iterator[None]:
    """Compiled programs go with their module: each holds mappings of memory, of which a process may
    have 65,530, and a worker compiles enough to reach that."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="module", autouse=True)
def compiler_of_one_module(request: pytest.FixtureRequest) -> Iterator[None]:
    """In modules marked `compiled_quickly`, and in commands that they start, LLVM optimizes little:
    what is computed stays what it is, and small shapes compile in half the time. Not for modules
    about single bits, the bytes of a program, or another compiler than the CPU's."""
    if request.node.get_closest_marker("compiled_quickly") is None:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        before = jax.config.read("jax_disable_most_optimizations")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", before)
