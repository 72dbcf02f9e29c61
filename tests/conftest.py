"""Eight emulated CPU devices and strict promotion, before JAX wakes up."""

import gc
import os
from collections import Counter
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
from jax._src import compiler

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, those with the most of them before others: workers take
    whole files, and the last ones should be short."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def pytest_collection_finish() -> None:
    """What imports have made stays: the garbage collector, which tracing calls often, need not walk
    through all of it each time."""
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_module() -> Iterator[None]:
    """Compiled programs go with their module: each holds mappings of memory, of which a process may
    have 65,530, and a worker compiles enough to reach that."""
    yield
    jax.clear_caches()
    gc.collect()


_compile_options = compiler.get_compile_options
# The newer of the two ways in which this compiler writes fused loops takes far longer with little
# programs. Later versions know that way alone, and not the flag.
QUICK_FLAGS = {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {}


@pytest.fixture(scope="module", autouse=True)
def compiler_of_one_module(request: pytest.FixtureRequest) -> Iterator[None]:
    """In modules marked `compiled_quickly`, and in commands that they start, LLVM optimizes little:
    what is computed stays what it is, and small shapes compile in a fraction of the time. Not for
    modules about single bits, the bytes of a program, or another compiler than the CPU's."""
    if request.node.get_closest_marker("compiled_quickly") is None:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        words = [f"--{name}={str(value).lower()}" for name, value in QUICK_FLAGS.items()]
        patch.setenv("XLA_FLAGS", " ".join([os.environ["XLA_FLAGS"], *words]))
        patch.setattr(compiler, "get_compile_options", _quick_compile_options)
        before = jax.config.read("jax_disable_most_optimizations")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", before)


def _quick_compile_options(*args, env_options_overrides=None, **kwargs):
    """JAX's own function of this name; a process reads XLA_FLAGS once, so a module of it needs
    another way to say the same."""
    overrides = {**QUICK_FLAGS, **(env_options_overrides or {})}
    return _compile_options(*args, env_options_overrides=overrides, **kwargs)
