"""The workers of a slice, all at once: files copied to them, `worker.sh` run on them."""

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from train.launch import places
from train.launch.gcloud import CommandError, Runner, check, failure
from train.launch.places import Placed
from train.launch.plan import Target
from train.launch.secrets import Redactor

SCRIPT = "worker.sh"
# Lines of the log come behind this mark, so that nothing that gcloud or ssh says is taken for one.
LOG_MARK = "| "

_STATUS = re.compile(r"^llama-jax-status (\S+) (absent|running|lost|exited:\d+) (\S+)$", re.M)
_SSH_SECONDS = 600.0
_INSTALL_SECONDS = 1800.0
# A new machine takes no logins for a while.
_LOGIN_TRIES, _LOGIN_PAUSE_SECONDS = 8, 15.0


@dataclass(frozen=True)
class WorkerState:
    """state: absent, running, lost (it ended and left no exit code) or exited."""

    host: str
    state: str
    exit_code: int | None
    config_id: str


def folder(name: str) -> str:
    """Where a job lies on a worker, seen from the home folder."""
    return f"llama-jax/{name}"


def job_variables(placed: Placed, *, package: str, extras: str, config_id: str) -> str:
    """What `worker.sh` reads first."""
    values = {
        "PACKAGE": package,
        "EXTRAS": extras,
        "BUCKETS": " ".join(placed.buckets),
        "MOUNT_ROOT": places.MOUNT_ROOT,
        "OUTPUT": placed.output,
        "CONFIG_ID": config_id,
    }
    return "".join(f"{name}={shlex.quote(value)}\n" for name, value in values.items())


def script() -> str:
    return (resources.files("train.launch") / SCRIPT).read_text(encoding="utf-8")


def _reach(target: Target, worker: str) -> list[str]:
    """Which machines: `all`, or `0`, the first of the first slice."""
    command = [
        f"--project={target.project}", f"--zone={target.zone}", "--quiet",
        f"--worker={worker}", f"--node={worker}",
    ]  # fmt: skip
    return [*command, "--tunnel-through-iap"] if target.tunnel else command


def ssh_command(target: Target, command: str, *, worker: str = "all") -> list[str]:
    return [
        "gcloud", "compute", "tpus", "queued-resources", "ssh", target.name,
        *_reach(target, worker), f"--command={command}",
    ]  # fmt: skip


def copy_command(target: Target, source: Path, destination: str) -> list[str]:
    return [
        "gcloud", "compute", "tpus", "queued-resources", "scp", "--recurse", str(source),
        f"{target.name}:{destination}", *_reach(target, "all"),
    ]  # fmt: skip


@dataclass
class Workers:
    """All workers of one queued resource."""

    runner: Runner
    target: Target
    redact: Redactor
    sleep: Callable[[float], None]

    def prepare(self) -> None:
        """Makes the folder of the job, waiting for machines that have just started."""
        line = ssh_command(self.target, f"umask 077; mkdir -p {folder(self.target.name)}")
        for tries in range(1, _LOGIN_TRIES + 1):
            answer = self.runner.run(line, timeout=_SSH_SECONDS)
            if answer.ok:
                return
            if tries < _LOGIN_TRIES:
                self.sleep(_LOGIN_PAUSE_SECONDS)
        raise failure(line, answer, self.redact)

    def copy(self, staged: Path) -> None:
        """Copies a folder that is called as the job is."""
        line = copy_command(self.target, staged, "llama-jax/")
        check(self.runner, line, self.redact, timeout=_INSTALL_SECONDS)

    def install(self) -> None:
        self._run("install", timeout=_INSTALL_SECONDS)

    def start(self) -> None:
        self._run("start", timeout=_SSH_SECONDS)

    def stop(self, seconds: int) -> None:
        self._run("stop", str(seconds), timeout=seconds + _SSH_SECONDS)

    def _run(self, *words: str, timeout: float) -> None:
        line = ssh_command(self.target, self._script(*words))
        check(self.runner, line, self.redact, timeout=timeout)

    def _script(self, *words: str) -> str:
        return shlex.join(["bash", f"{folder(self.target.name)}/{SCRIPT}", *words])

    def states(self) -> list[WorkerState]:
        """What each worker that answers says; one that does not is left out."""
        script = f"{folder(self.target.name)}/{SCRIPT}"
        line = ssh_command(
            self.target,
            f"if [ -f {script} ]; then bash {script} status; "
            f'else echo "llama-jax-status $(hostname) absent -"; fi',
        )
        answer = self.runner.run(line, timeout=_SSH_SECONDS)
        return parse_states(answer.stdout)

    def log(self, first: int, seconds: int, show: Callable[[str], None]) -> int:
        """Shows the first worker's log from line `first`, counted from 1, as it grows; returns
        after `seconds`, or when training ends, how many lines there were."""
        shown = 0

        def on_line(text: str) -> None:
            nonlocal shown
            if text.startswith(LOG_MARK):
                shown += 1
                show(self.redact(text.removeprefix(LOG_MARK)))

        line = ssh_command(
            self.target, self._script("follow", str(first), str(seconds)), worker="0"
        )
        self.runner.run(line, timeout=seconds + _SSH_SECONDS, on_line=on_line)
        return shown


def parse_states(text: str) -> list[WorkerState]:
    found = []
    for host, state, config_id in _STATUS.findall(text):
        name, _, code = state.partition(":")
        found.append(WorkerState(host, name, int(code) if code else None, config_id))
    return found


def check_same_config(states: Sequence[WorkerState], config_id: str, name: str) -> None:
    """Raises CommandError where another run is under way on these machines."""
    others = {each.config_id for each in states if each.state == "running"} - {config_id}
    if others:
        raise CommandError(
            f"{name} is training with another config; stop it first (--stop), or choose another "
            f"--name",
            "busy",
        )
