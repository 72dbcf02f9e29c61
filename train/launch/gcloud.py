"""Commands of other programs: run, timed, and what their failures mean to a user."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from train.launch.secrets import Redactor


@dataclass(frozen=True)
class Answer:
    """returncode is None where the command was stopped because it took too long."""

    returncode: int | None
    stdout: str
    stderr: str = ""

    @property
    def ok(self) -> bool:
        return self.returncode == 0


class CommandError(RuntimeError):
    """A command failed. kind: what went wrong, in one word, where it is known."""

    def __init__(self, message: str, kind: str = ""):
        super().__init__(message)
        self.kind = kind


class Runner(Protocol):
    """Runs commands, or writes down what would be run (`is_dry`)."""

    is_dry: bool

    def run(
        self,
        command: Sequence[str],
        *,
        timeout: float | None = None,
        on_line: Callable[[str], None] | None = None,
    ) -> Answer:
        """on_line: called with each line of standard output as it comes."""

    def note(self, text: str) -> None:
        """Says what the next commands are for."""

    def show_file(self, name: str, text: str) -> None:
        """Shows a file that the next commands copy."""


class Shell:
    """Really runs commands. note: where notes go."""

    is_dry = False

    def __init__(self, note: Callable[[str], None]):
        self._note = note

    def note(self, text: str) -> None:
        self._note(text)

    def show_file(self, name: str, text: str) -> None:
        """The file is there to be looked at."""

    def run(
        self,
        command: Sequence[str],
        *,
        timeout: float | None = None,
        on_line: Callable[[str], None] | None = None,
    ) -> Answer:
        try:
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                # gcloud starts ssh: all of them are stopped together, and by nobody else.
                start_new_session=True,
            )
        except FileNotFoundError as error:
            raise CommandError(
                f"{command[0]} is not installed, or not on PATH; {_HOW_TO_INSTALL[command[0]]}",
                "uninstalled",
            ) from error
        return _watch(process, timeout, on_line)


def _watch(
    process: "subprocess.Popen[str]",
    timeout: float | None,
    on_line: Callable[[str], None] | None,
) -> Answer:
    """Reads a process to its end; stops it when its time is over or reading is interrupted."""
    lines: list[str] = []
    complaints: list[str] = []
    assert process.stdout is not None and process.stderr is not None
    errors = process.stderr
    # Both streams are read at once: one that nobody reads would stop the process when it is full.
    reader = threading.Thread(target=lambda: complaints.extend(errors), daemon=True)
    late = threading.Event()

    def stop() -> None:
        late.set()
        _kill(process)

    timer = threading.Timer(timeout, stop) if timeout is not None else None
    try:
        reader.start()
        if timer is not None:
            timer.start()
        for line in process.stdout:
            lines.append(line)
            if on_line is not None:
                on_line(line.rstrip("\n"))
        process.wait()
        reader.join()
    finally:
        if timer is not None:
            timer.cancel()
        _kill(process)
        process.wait()
        reader.join()
        process.stdout.close()
        errors.close()
    code = None if late.is_set() else process.returncode
    return Answer(code, "".join(lines), "".join(complaints))


def _kill(process: "subprocess.Popen[str]") -> None:
    """The process and what it started. Nothing where all have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


_HOW_TO_INSTALL = {
    "gcloud": "see https://cloud.google.com/sdk/docs/install, then run `gcloud auth login`",
    "kubectl": "run `gcloud components install kubectl gke-gcloud-auth-plugin`",
}


# What gcloud says, what that is, and what to do. The first that matches counts: a disabled API is
# also reported as a lack of permission.
_MEANINGS = (
    (
        "disabled",
        r"SERVICE_DISABLED|has not been used in project|API .* is (not enabled|disabled)",
        "the Cloud TPU API is off in this project: gcloud services enable tpu.googleapis.com",
    ),
    (
        "login",
        r"active account|[Rr]eauthenticat|UNAUTHENTICATED|invalid_grant|credentials? .*(expired|"
        r"invalid|not found)|gcloud auth login",
        "log in: gcloud auth login",
    ),
    (
        "quota",
        r"[Qq]uota|RESOURCE_EXHAUSTED",
        "ask for more on the Quotas page of the Cloud console (filter by the TPU's generation and "
        "the zone; spot has a quota of its own), or take a smaller --slice or another --zone",
    ),
    (
        "missing",
        r"NOT_FOUND|HTTPError 404|was not found|does not exist",
        "check --name, --project and --zone",
    ),
    (
        "permission",
        r"PERMISSION_DENIED|HTTPError 403|does not have permission|Permission .*denied",
        "your account needs roles/tpu.admin in the project and roles/iam.serviceAccountUser on the "
        "service account of the machines",
    ),
    (
        "exists",
        r"ALREADY_EXISTS|already exists",
        "choose another --name, or remove the old one with --delete",
    ),
    (
        "capacity",
        r"no more capacity|[Ss]tockout|insufficient capacity",
        "nothing is free there now: try another --zone, or --spot",
    ),
    (
        "offer",
        r"[Aa]ccelerator.?[Tt]ype|[Rr]untime.?[Vv]ersion|INVALID_ARGUMENT",
        "see what the zone offers: gcloud compute tpus accelerator-types list --zone ZONE, and "
        "gcloud compute tpus tpu-vm versions list --zone ZONE",
    ),
)


def meaning(stderr: str) -> tuple[str, str]:
    """(kind, advice) of gcloud's complaint, both empty where it is none that is known."""
    for kind, pattern, advice in _MEANINGS:
        if re.search(pattern, stderr):
            return kind, advice
    return "", ""


def failure(command: Sequence[str], answer: Answer, redact: Redactor) -> CommandError:
    """The error of a command that failed, with its own words and what to do about it."""
    shown = redact(shlex.join(command))
    if answer.returncode is None:
        return CommandError(f"{shown} took too long and was stopped", "timeout")
    said = redact(" ".join(answer.stderr.split()))[-800:]
    kind, advice = meaning(answer.stderr)
    parts = [f"{shown} failed with code {answer.returncode}", said, advice]
    return CommandError(". ".join(part.rstrip(".") for part in parts if part), kind)


def check(
    runner: Runner, command: Sequence[str], redact: Redactor, *, timeout: float | None = None
) -> str:
    """Standard output of a command that must succeed; CommandError otherwise."""
    answer = runner.run(command, timeout=timeout)
    if not answer.ok:
        raise failure(command, answer, redact)
    return answer.stdout


class DryRun:
    """Writes down commands, each ready to be pasted into a shell, and answers as if all went well.

    answers: (words that a command contains, its answers in turn, the last for ever after).
    """

    is_dry = True

    def __init__(self, answers: Sequence[tuple[Sequence[str], Sequence[Answer]]]):
        self.lines: list[str] = []
        self.files: dict[str, str] = {}
        self._answers = [(words, list(each)) for words, each in answers]

    def show_file(self, name: str, text: str) -> None:
        self.files[name] = text

    def note(self, text: str) -> None:
        self.lines += [f"# {line}" for line in text.splitlines()]

    def run(
        self,
        command: Sequence[str],
        *,
        timeout: float | None = None,
        on_line: Callable[[str], None] | None = None,
    ) -> Answer:
        del timeout, on_line
        self.lines.append(shlex.join(command))
        for words, answers in self._answers:
            if all(word in command for word in words):
                return answers.pop(0) if len(answers) > 1 else answers[0]
        return Answer(0, "")
