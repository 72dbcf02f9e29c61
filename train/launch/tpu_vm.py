"""A run on Cloud TPU VMs, from asking for the machines to giving them back.

The slice is created, or found; the job is installed and started on all workers, or found running;
its log is followed; a slice that was taken away is asked for again, and training goes on from the
checkpoint in the bucket.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from train.launch import queued
from train.launch.gcloud import CommandError, Runner
from train.launch.plan import Machines, Target
from train.launch.secrets import Redactor
from train.launch.staging import Cargo, stage
from train.launch.workers import Workers, WorkerState, check_same_config

FOLLOW_SECONDS = 60
# Workers that do not answer while Cloud says that all is well: how often that is borne.
_SILENCES = 10
_POLL_SECONDS = 30.0
# Exit codes of a process that wants to go on: it saved after SIGTERM, which a machine about to go
# sends (train.interrupt.EXIT_CODE, not imported because that brings JAX), or SIGTERM ended it.
RESUME_CODES = (75, 143)


class Health(Enum):
    """How the machines of a slice are."""

    THERE = "there"
    REPAIRED = "repaired"
    GONE = "taken away"


class Ending(Enum):
    """How the watching of a job ended."""

    DONE = "done"
    FAILED = "failed"
    GONE = "taken away"
    BROKEN = "stopped midway"


@dataclass(frozen=True)
class Outcome:
    """state: done, failed or started. attempts: how often training was started.
    exit_code: of the first worker that failed."""

    state: str
    attempts: int
    deleted: bool
    exit_code: int | None = None


@dataclass
class TpuVmJob:
    """retries: how often a job that was taken away or broke is brought up again.
    holds: whether there is a request, and so a cost, that this job made or found."""

    machines: Machines
    cargo: Cargo
    runner: Runner
    redact: Redactor
    show: Callable[[str], None]
    clock: Callable[[], float]
    sleep: Callable[[float], None]
    retries: int
    keep: bool
    detach: bool
    holds: bool = field(default=False, init=False)
    _exit_code: int | None = field(default=None, init=False)

    @property
    def target(self) -> Target:
        return self.machines.target

    @property
    def workers(self) -> Workers:
        return Workers(self.runner, self.target, self.redact, self.sleep)

    def run(self) -> Outcome:
        """Raises CommandError when machines or workers cannot be had, or break too often."""
        if self.runner.is_dry:
            return self._run(self._staged(Path("launch")))
        with tempfile.TemporaryDirectory(prefix="llama-jax-launch-") as scratch:
            return self._run(self._staged(Path(scratch)))

    def _staged(self, scratch: Path) -> Path:
        folder = scratch / self.target.name
        project = self.target.project
        stage(self.cargo, folder, project=project, runner=self.runner, redact=self.redact)
        return folder

    def _run(self, staged: Path) -> Outcome:
        for attempt in range(1, self.retries + 2):
            self._obtain()
            if self._bring_up(staged):
                if self.detach:
                    return Outcome("started", attempt, deleted=False)
                ending = self._watch()
            else:
                ending = Ending.GONE
            if ending in (Ending.DONE, Ending.FAILED):
                return self._end(ending, attempt)
            self.runner.note(f"{self.target.name} was {ending.value}; bringing it up again")
        raise self._too_often()

    def _too_often(self) -> CommandError:
        return CommandError(
            f"{self.target.name} was taken away or broke {self.retries + 1} times; see the logs, "
            f"then launch again to go on from the last checkpoint, or raise --retries",
            "retries",
        )

    # Machines

    def _obtain(self) -> None:
        """Returns when there is an active slice, a new one if there must be."""
        for _ in range(self.retries + 1):
            found = self._settled()
            if found is not None:
                queued.check_same(self.machines, found)
                self.holds = True
                if found.state in queued.DEAD:
                    self.runner.note(f"{self.target.name} is {found.state}: away with it")
                    self._delete()
                    found = None
            if found is None:
                self.runner.note(self.machines.slice.describe() + f", {self.machines.tier}")
                queued.create(self.runner, self.machines, self.redact)
                self.holds = True
            try:
                queued.wait_until_active(
                    self.runner, self.machines, self.redact,
                    clock=self.clock, sleep=self.sleep, poll_seconds=_POLL_SECONDS,
                )  # fmt: skip
                return
            except CommandError as error:
                if error.kind in ("failed", "wait"):
                    # Nothing was allotted. A request left in the queue could cost money later.
                    self._delete()
                if error.kind != "gone":
                    raise
        raise self._too_often()

    def _settled(self) -> queued.Request | None:
        """The request once it is no longer on its way out; till then it cannot be deleted."""
        start = self.clock()
        while True:
            found = queued.find(self.runner, self.target, self.redact)
            if found is None or found.state not in queued.GOING:
                return found
            if self.clock() - start > self.machines.wait_seconds:
                raise CommandError(
                    f"{self.target.name} has been {found.state} for {self.machines.wait_seconds} "
                    f"seconds; choose another --name",
                    "stuck",
                )
            self.sleep(_POLL_SECONDS)

    def _delete(self) -> None:
        queued.delete(self.runner, self.target, self.redact)
        self.holds = False

    def _examine(self) -> Health:
        """How the machines are; waits for those that Cloud is repairing."""
        repaired = False
        while True:
            found = queued.find(self.runner, self.target, self.redact)
            if found is None or found.state != queued.ACTIVE:
                return Health.GONE
            states = queued.node_states(self.runner, self.target, self.machines.nodes)
            if any(state in (*queued.NODE_GONE, "MISSING") for state in states):
                return Health.GONE
            if not any(state in queued.NODE_COMING for state in states):
                return Health.REPAIRED if repaired else Health.THERE
            repaired = True
            self.runner.note(f"{self.target.name} is being repaired: {', '.join(states)}")
            self.sleep(_POLL_SECONDS)

    # Job

    def _bring_up(self, staged: Path) -> bool:
        """Installs and starts training unless it runs; False if the machines went meanwhile."""
        workers = self.workers
        try:
            workers.prepare()
            states = self._all_states()
            check_same_config(states, self.cargo.config_id, self.target.name)
            if self._is_at_hand(states):
                return True
            if any(each.state == "running" for each in states):
                workers.stop(300)
            self.runner.note(f"the job, to all {self.machines.num_workers} workers")
            workers.copy(staged)
            workers.install()
            workers.start()
        except CommandError as error:
            if error.kind == "busy" or self._examine() is Health.THERE:
                raise
            return False
        return True

    def _all_states(self) -> list[WorkerState]:
        """What every worker says. Training on one that is merely slow to answer must not be taken
        for one that is not there: it would be stopped and started anew."""
        for _ in range(_SILENCES):
            states = self.workers.states()
            if len(states) == self.machines.num_workers:
                return states
            self.sleep(_POLL_SECONDS)
        raise CommandError(
            f"of the {self.machines.num_workers} workers of {self.target.name} only {len(states)} "
            f"answer; look at them in the Cloud console, or remove them with --delete",
            "silent",
        )

    def _is_at_hand(self, states: list[WorkerState]) -> bool:
        """Whether this very run is under way, or at its end, on all workers."""
        if all(each.state == "running" for each in states):
            self.runner.note("training is under way already")
            return True
        same = all(each.config_id == self.cargo.config_id for each in states)
        if same and all(each.exit_code == 0 for each in states):
            self.runner.note("training has ended already")
            return True
        return False

    def _watch(self) -> Ending:
        """Follows the log until training ended or the machines went."""
        workers, first, silences = self.workers, 1, 0
        self.runner.note("the log of the first worker")
        while True:
            first += workers.log(first, FOLLOW_SECONDS, self.show)
            ending, answered = self._judge(workers.states())
            if ending is None and answered:
                silences = 0
                continue
            # What workers say of a machine that is on its way out counts less than its state.
            health = self._examine()
            if health is Health.GONE:
                return Ending.GONE
            if health is Health.REPAIRED and ending is Ending.FAILED:
                # Workers fail when one they wait for is restarted under them.
                return Ending.BROKEN
            if ending is not None:
                return ending
            silences += 1
            if silences > _SILENCES:
                raise CommandError(
                    f"{self.target.name} is active but its workers do not answer; training may "
                    f"still run. See --status, or remove it with --delete",
                    "silent",
                )
            self.sleep(_POLL_SECONDS)

    def _judge(self, states: list[WorkerState]) -> tuple[Ending | None, bool]:
        """(how it ended, None while it has not; whether all workers answered)."""
        codes = [each.exit_code for each in states if each.exit_code is not None]
        bad = [code for code in codes if code != 0 and code not in RESUME_CODES]
        answered = len(states) == self.machines.num_workers
        if bad:
            self._exit_code = bad[0]
            return Ending.FAILED, answered
        if answered and codes == [0] * len(states):
            return Ending.DONE, True
        if any(code != 0 for code in codes) or any(
            each.state in ("lost", "absent") for each in states
        ):
            return Ending.BROKEN, answered
        return None, answered

    def _end(self, ending: Ending, attempt: int) -> Outcome:
        if not self.keep:
            self.runner.note("the machines, given back")
            self._delete()
        return Outcome(ending.value, attempt, not self.keep, self._exit_code)
