#!/usr/bin/env bash
# Runs on every worker of a slice, in the folder of one job: installs, starts, watches, stops.
#
#   worker.sh install               the package, the buckets, the run folder
#   worker.sh start                 training, detached
#   worker.sh follow FIRST SECONDS  the log from line FIRST, each line after "| "
#   worker.sh status                "llama-jax-status HOST STATE CONFIG"
#   worker.sh stop SECONDS          training, by the signal that makes it save first
set -euo pipefail
umask 077
job="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# PACKAGE, EXTRAS, BUCKETS, MOUNT_ROOT, OUTPUT, CONFIG_ID
. "$job/job.env"

fail() {
  echo "llama-jax: $(hostname): $*" >&2
  exit 1
}

# A process id means nothing after the machine was restarted.
is_running() {
  [ -s "$job/pid" ] && [ "$(cat "$job/boot" 2>/dev/null)" = "$(boot_id)" ] &&
    kill -0 "$(cat "$job/pid")" 2>/dev/null
}

boot_id() {
  cat /proc/sys/kernel/random/boot_id
}

# The images of TPU VMs bring a Python that is older than this package needs; uv brings its own.
make_venv() {
  local python
  for python in python3.13 python3.12 python3.11 python3; do
    if "$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
      2>/dev/null; then
      "$python" -m venv "$job/venv"
      return
    fi
  done
  python3 -m pip install --quiet --user uv || fail "no Python 3.11, and uv cannot be installed"
  python3 -m uv venv --quiet --seed --python 3.12 "$job/venv"
}

install_package() {
  local wanted="$PACKAGE"
  # A wheel that was copied beside this script.
  [ -f "$job/$PACKAGE" ] && wanted="$job/$PACKAGE"
  if [ "$(cat "$job/installed" 2>/dev/null)" = "$PACKAGE[$EXTRAS] $(checksum "$wanted")" ]; then
    return
  fi
  [ -x "$job/venv/bin/python" ] || make_venv
  "$job/venv/bin/python" -m pip install --quiet "$(with_extras "$wanted")"
  # The same version built anew has other contents, which pip alone would not look at.
  if [ -f "$wanted" ]; then
    "$job/venv/bin/python" -m pip install --quiet --force-reinstall --no-deps "$wanted"
  fi
  echo "$PACKAGE[$EXTRAS] $(checksum "$wanted")" >"$job/installed"
}

checksum() {
  if [ -f "$1" ]; then sha256sum <"$1" | cut -c1-16; else echo "$1"; fi
}

# name==1.0 -> name[extras]==1.0; a file's path takes them at its end, a URL in front of "@".
with_extras() {
  case "$1" in
    /*) echo "$1[$EXTRAS]" ;;
    *"["*) echo "$1" | sed "s/\[/[$EXTRAS,/" ;;
    *) echo "$1" | sed -E "s/^([A-Za-z0-9._-]+)/\1[$EXTRAS]/" ;;
  esac
}

install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc repository
  repository="https://packages.cloud.google.com/apt"
  curl -fsSL "$repository/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] $repository gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get update -qq && sudo apt-get install -yqq gcsfuse
}

mount_buckets() {
  local bucket target
  for bucket in $BUCKETS; do
    target="$MOUNT_ROOT/$bucket"
    mountpoint -q "$target" && continue
    command -v gcsfuse >/dev/null || install_gcsfuse || fail "gcsfuse cannot be installed"
    sudo mkdir -p "$target"
    sudo chown "$(id -u):$(id -g)" "$target"
    # Checkpoints are written under another name and then renamed, whole folders at a time.
    gcsfuse --implicit-dirs --rename-dir-limit=200000 "$bucket" "$target" ||
      fail "the bucket gs://$bucket cannot be mounted: does it exist, and may the machines' \
service account use it (roles/storage.objectUser)?"
  done
}

check_output() {
  local kind probe
  probe="$OUTPUT/.written-by-$(hostname)"
  mkdir -p "$OUTPUT" && : >"$probe" && rm "$probe" || fail "cannot write to $OUTPUT"
  kind="$(findmnt --noheadings --output FSTYPE --target "$OUTPUT")"
  case "$kind" in
    fuse* | nfs* | lustre* | ceph* | 9p) ;;
    *) fail "the run folder $OUTPUT lies on this machine's own disk ($kind), which goes away with \
it; use output=gs://BUCKET/PATH" ;;
  esac
}

start() {
  # What left its code has ended, although its shell may take a moment to go.
  if is_running && [ ! -f "$job/exit-code" ]; then
    echo "llama-jax: $(hostname): already running" >&2
    return
  fi
  rm -f "$job/exit-code" "$job/pid"
  [ -f "$job/train.log" ] && cat "$job/train.log" >>"$job/earlier.log"
  : >"$job/train.log"
  boot_id >"$job/boot"
  nohup setsid bash "$job/worker.sh" run </dev/null >>"$job/train.log" 2>&1 &
  # It names itself once it is in a session of its own, which the end of this login spares.
  for ((tries = 0; tries < 300; tries++)); do
    [ ! -s "$job/pid" ] || return 0
    sleep 0.1
  done
  fail "training did not start within 30 seconds"
}

run() {
  local code=0 child
  echo "$$" >"$job/pid"
  # However it ends, by a secret that cannot be fetched too, there is a code to be seen.
  trap 'finish "$?"' EXIT
  . "$job/environment.sh"
  if [ -f "$job/forwarded.sh" ]; then
    . "$job/forwarded.sh"
  fi
  # Files that were copied with the config are named from here.
  cd "$job"
  "$job/venv/bin/llama-jax" train "$job/config.json" &
  child=$!
  trap 'kill -TERM "$child" 2>/dev/null' TERM
  # A signal ends `wait` early: wait until the process itself has ended, then ask for its code.
  while kill -0 "$child" 2>/dev/null; do
    wait "$child" || true
  done
  wait "$child" || code=$?
  exit "$code"
}

finish() {
  # Best effort, and first: the log outlives the machine.
  mkdir -p "$OUTPUT/logs" && cat "$job/train.log" >>"$OUTPUT/logs/$(hostname).log" || true
  echo "$1" >"$job/exit-code.new"
  mv "$job/exit-code.new" "$job/exit-code"
}

follow() {
  local watched
  [ -f "$job/train.log" ] || return 0
  watched="$(cat "$job/pid" 2>/dev/null || echo 1)"
  # Ends with the job, or when the time is over and the one who follows looks around.
  timeout "$2" tail -n "+$1" -s 0.3 -F --pid="$watched" "$job/train.log" 2>/dev/null |
    sed -u 's/^/| /' || true
}

status() {
  local state=absent
  if [ -f "$job/exit-code" ]; then
    state="exited:$(cat "$job/exit-code")"
  elif is_running; then
    state=running
  elif [ -f "$job/exit-code" ]; then
    # It ended between the two looks.
    state="exited:$(cat "$job/exit-code")"
  elif [ -f "$job/pid" ]; then
    state=lost
  fi
  echo "llama-jax-status $(hostname) $state $CONFIG_ID"
}

stop() {
  local seconds="$1"
  is_running || return 0
  kill -TERM "$(cat "$job/pid")"
  while is_running && [ "$seconds" -gt 0 ]; do
    sleep 1
    seconds=$((seconds - 1))
  done
  if is_running; then
    fail "still running after $1 seconds; it saves after the step it is in"
  fi
}

case "${1:-}" in
  install)
    # It may only be read by its owner, whatever the copying made of it.
    [ ! -f "$job/forwarded.sh" ] || chmod 600 "$job/forwarded.sh"
    mount_buckets
    check_output
    install_package
    ;;
  start) start ;;
  run) run ;;
  follow) follow "$2" "$3" ;;
  status) status ;;
  stop) stop "$2" ;;
  *) fail "unknown: ${1:-nothing}" ;;
esac
