"""What must be settled before JAX starts: emulated devices and the compilation cache.

Only entry points call this; importing a module of this project settles nothing.
"""

import contextlib
import hashlib
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from llama_jax.paths import to_path

if TYPE_CHECKING:
    from llama_jax.mesh.processes import Processes

CACHE_VARIABLE = "LLAMA_JAX_CACHE_DIR"
CACHE_OFF = "off"
CPUINFO = Path("/proc/cpuinfo")

# Compilations shorter than this are not worth a file.
MIN_COMPILE_SECONDS = 0.1


def cache_dir() -> Path | None:
    """The folder of compiled programs, or None where LLAMA_JAX_CACHE_DIR=off.

    Programs compiled for one processor may use instructions that another lacks, so each
    kind of processor has its own folder (home folders are often shared between machines).
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen == CACHE_OFF:
        return None
    if chosen is not None and not chosen.strip():
        raise ValueError(
            f"{CACHE_VARIABLE} is empty: unset it, set it to a folder, or to '{CACHE_OFF}'"
        )
    if chosen is not None:
        root = to_path(chosen)
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        root = to_path(base) / "llama-jax"
    return root / f"jaxlib-{metadata.version('jaxlib')}-{_processor()}"


def _processor() -> str:
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    # "flags" on x86, "Features" on Arm: the instruction sets, the same for every core.
    described = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    text = f"{platform.machine()} {described or platform.processor()}"
    return f"{platform.machine()}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def start_jax(*, cpu_devices: int | None = None, processes: "Processes | None" = None) -> None:
    """Imports JAX with the compilation cache on, meets the other processes if there are any, and
    emulates devices if asked: `cpu_devices` of them, over all processes.

    Raises ValueError for a count below 1 or one that the processes cannot share evenly,
    RuntimeError when JAX already runs with another one or the processes do not meet.
    """
    if cpu_devices is not None and cpu_devices < 1:
        raise ValueError(f"at least 1 CPU device must be emulated, not {cpu_devices}")
    count = 1 if processes is None or processes.count is None else processes.count
    if cpu_devices is not None and cpu_devices % count:
        raise ValueError(
            f"mesh.cpu_devices is {cpu_devices}, which {count} processes cannot share evenly"
        )
    if cpu_devices is not None:
        # Emulation means the CPU, whatever else the machine has.
        os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    if cpu_devices is not None:
        _emulate(cpu_devices // count)
    if processes is not None:
        from llama_jax.mesh.distributed import join

        # What carries collectives between the CPU devices of several processes.
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        join(processes)
    if cpu_devices is not None:
        _check_emulated(cpu_devices)
    folder = cache_dir()
    if folder is None or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def _emulate(cpu_devices: int) -> None:
    """Settles how many devices this process will have; wakes nothing up."""
    import jax

    _wait_for_each_other()
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX runs already: see what it runs with
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", cpu_devices)


def _check_emulated(cpu_devices: int) -> None:
    import jax

    running = jax.device_count()
    if running != cpu_devices:
        raise RuntimeError(
            f"JAX runs with {running} CPU devices, {cpu_devices} were asked for: unset "
            "xla_force_host_platform_device_count in XLA_FLAGS, or ask before JAX starts"
        )


def _wait_for_each_other() -> None:
    """Lets emulated devices be as slow as a busy machine makes them.

    They meet in every collective; one that others wait for longer than XLA's 40 seconds would end
    the process, and threads that share few cores can be that late.
    """
    flags = os.environ.get("XLA_FLAGS", "").split()
    for name, seconds in (("warn_stuck", 120), ("terminate", 1200)):
        flag = f"--xla_cpu_collective_call_{name}_timeout_seconds"
        if not any(each.startswith(flag) for each in flags):
            flags.append(f"{flag}={seconds}")
    os.environ["XLA_FLAGS"] = " ".join(flags)
