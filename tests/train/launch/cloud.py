"""A cloud of folders: the fake gcloud on PATH, and the programs that workers call."""

import json
import os
import stat
import sys
from pathlib import Path

FAKE = Path(__file__).parent / "fake_gcloud.py"

# A worker's own programs. Its Python makes a venv whose pip writes down what it is asked for and
# whose llama-jax does what the script of the test says.
_PROGRAMS = {
    "gcloud": f'exec {sys.executable} {FAKE} "$@"',
    "hostname": 'echo "${FAKE_HOST:-laptop}"',
    "sudo": 'exec "$@"',
    "gcsfuse": 'echo "gcsfuse $*" >>"$HOME/programs"',
    "mountpoint": "exit 1",
    "findmnt": 'cat "$FAKE_CLOUD/filesystem"',
    "python3.13": "exit 1",
    "python3.12": """
case "$1" in
  -c) exit 0 ;;
  -m) mkdir -p "$3/bin"
      cp "$FAKE_CLOUD/bin/venv-python" "$3/bin/python"
      cp "$FAKE_CLOUD/bin/train" "$3/bin/llama-jax" ;;
esac""",
    "venv-python": 'echo "pip ${*:3}" >>"$HOME/programs"',
    "train": """
echo "$@" >>"$HOME/trained"
env >"$HOME/environment"
pwd >"$HOME/folder"
exec bash "$FAKE_CLOUD/training.sh" """,
}


class Cloud:
    """script: what happens. training: the shell that every worker runs as its training."""

    def __init__(self, root: Path, monkeypatch, hosts: int = 2, **script):
        self.root = root
        (root / "bin").mkdir(parents=True)
        for name, text in _PROGRAMS.items():
            path = root / "bin" / name
            path.write_text(f"#!/bin/bash\n{text}\n")
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
        (root / "script.json").write_text(json.dumps({"hosts": hosts, **script}))
        self.filesystem("fuse.gcsfuse")
        self.training("echo step 1; echo step 2")
        monkeypatch.setenv("FAKE_CLOUD", str(root))
        monkeypatch.setenv("PATH", f"{root / 'bin'}:{os.environ['PATH']}")
        monkeypatch.setattr("train.launch.places.MOUNT_ROOT", str(root / "mounted"))
        monkeypatch.setattr("train.launch.tpu_vm.FOLLOW_SECONDS", 1)

    def filesystem(self, kind: str) -> None:
        (self.root / "filesystem").write_text(f"{kind}\n")

    def training(self, shell: str) -> None:
        (self.root / "training.sh").write_text(f"{shell}\n")

    def calls(self, kind: str = "") -> list[list[str]]:
        path = self.root / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [each["argv"] for each in map(json.loads, lines) if kind in each["kind"]]

    def worker(self, number: int) -> Path:
        return self.root / f"worker-{number}"

    @property
    def request(self):
        path = self.root / "request.json"
        return json.loads(path.read_text()) if path.exists() else None
