#!/usr/bin/env bash
# What tpu_run.sh does on each host of a pod. Each command may be given again: nothing happens twice.
#
#   host.sh unpack CODE         puts code-CODE.tar.gz, which lies in $HOME, where it belongs
#   host.sh install CODE        installs Python and the package, once, and gcsfuse
#   host.sh start NAME CODE WORKDIR ARGUMENTS...   starts the training, or says that it runs already
#   host.sh status NAME         prints HOST running, HOST ended EXIT_CODE or HOST none
#   host.sh size NAME           prints how many bytes the log has
#   host.sh follow NAME FROM    prints the log from that byte on, until the training ends
#   host.sh stop NAME SECONDS   SIGTERM to the training, once; SIGKILL if it has not ended then
#
# The trainer works on files. A bucket is mounted by gcsfuse at /gcs/BUCKET, and each argument that
# names gs://BUCKET/PATH is given to it as /gcs/BUCKET/PATH. The log is kept in WORKDIR/launch_logs.
set -euo pipefail

self=$(cd "$(dirname "$0")" && pwd)/$(basename "$0")
base=$HOME/alignx_jax
GCS_ROOT=${GCS_ROOT:-/gcs}

fail() {
  echo "Error on $(hostname): $*" >&2
  exit 1
}

unpack() { # CODE
  mkdir -p "$base/code" "$base/unpacking"
  if [ ! -d "$base/code/$1" ]; then
    rm -rf "${base:?}/unpacking/$1" # of a time that was cut off
    tar -xzf "$HOME/code-$1.tar.gz" -C "$base/unpacking"
    mv "$base/unpacking/$1" "$base/code/$1"
  fi
  rm -f "$HOME/code-$1.tar.gz"
}

install() { # CODE
  local code=$base/code/$1 venv=$base/venv
  # One at a time, and not again.
  exec 8>"$base/install.lock"
  flock 8
  if [ "$(cat "$venv/installed" 2>/dev/null)" != "$1" ]; then
    export PATH=$HOME/.local/bin:$PATH
    # The images of v4 to v6e come with Python 3.10.
    command -v uv >/dev/null || python3 -m pip install --quiet --user uv
    [ -e "$venv/bin/python" ] || uv venv --quiet --python 3.11 "$venv"
    uv pip install --quiet --python "$venv/bin/python" -e "${code}[tpu,gguf]"
    echo "$1" >"$venv/installed"
  fi
  if ! command -v gcsfuse >/dev/null; then
    local key=/usr/share/keyrings/cloud.google.asc
    curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt" \
      "gcsfuse-$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    # A fresh machine may be updating itself.
    sudo apt-get -qq -o DPkg::Lock::Timeout=300 update
    sudo apt-get -qq -o DPkg::Lock::Timeout=300 install -y gcsfuse >/dev/null
  fi
}

mount_bucket() { # BUCKET
  local point=$GCS_ROOT/$1
  mountpoint -q "$point" && return 0
  sudo mkdir -p "$point"
  sudo chown "$(id -u):$(id -g)" "$point"
  # Other hosts write too, so nothing about files is remembered. Only a file that is staged is
  # whole in the bucket after fsync. Checkpoints are renamed, directories with many files.
  # It lives on, and must not hold the training's lock.
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --enable-streaming-writes=false \
    --rename-dir-limit=1000000 "$1" "$point" >/dev/null 9>&- || fail "could not mount gs://$1"
}

# The path of gs://BUCKET/PATH here.
here() { printf '%s\n' "$GCS_ROOT/${1#gs://}"; }

start() { # NAME CODE WORKDIR ARGUMENTS...
  local run=$base/runs/$1 code=$2 workdir=$3 command="$*" argument arguments=()
  local began
  mkdir -p "$run"
  # Held by the training as long as one of its processes lives.
  exec 9>>"$run/lock"
  if ! flock -w 0.5 9; then
    [ "$(cat "$run/command")" = "$command" ] ||
      fail "$1 trains something else: $(cat "$run/command"). Let it end, or stop it by" \
        "launch/tpu_delete.sh; or use another --name."
    echo "$(hostname) runs already"
    return 0
  fi
  if [ "$(cat "$run/command" 2>/dev/null)" = "$command" ] && [ "$(cat "$run/code" 2>/dev/null)" = 0 ]; then
    echo "$(hostname) has finished already"
    return 0
  fi
  shift 3
  for argument in "$workdir" "$@"; do
    case $argument in
      *gs://*)
        workdir=${argument#*gs://}
        mount_bucket "${workdir%%/*}"
        argument=${argument%%gs://*}$(here "gs://$workdir")
        ;;
    esac
    arguments+=("$argument")
  done
  workdir=${arguments[0]}
  if ! { mkdir -p "$workdir/launch_logs" && : >"$workdir/launch_logs/.$(hostname)"; } 2>/dev/null; then
    fail "$workdir cannot be written to; give the TPU's service account the role" \
      "roles/storage.objectUser on the bucket."
  fi
  rm -f "$workdir/launch_logs/.$(hostname)" "$run/code" "$run/pid" "$run/asked"
  printf '%s\n' "$command" >"$run/command"
  [ -e "$run/began" ] || date -u +%Y%m%dT%H%M%SZ >"$run/began"
  began=$(cat "$run/began")
  cd "$base/code/$code"
  setsid bash "$self" train "$run" "$workdir/launch_logs/$(hostname)_$began.txt" \
    --workdir="$workdir" "${arguments[@]:1}" </dev/null >>"$run/log" 2>&1 &
  echo "$(hostname) started"
}

train() { # RUN LOG ARGUMENTS...: the training and the keeping of its log; by start alone
  local run=$1 log=$2 code=0 copier workdir
  shift 2
  workdir=${1#--workdir=}
  {
    while sleep 60; do keep "$run/log" "$log" "$workdir"; done
  } 9>&- &
  copier=$!
  # A machine that shuts down sends SIGTERM to all: the trainer saves, this waits for it.
  trap : TERM INT HUP
  # shellcheck disable=SC2016
  bash -c 'echo $$ >"$0/pid"; exec "${@:1}"' "$run" \
    "$base/venv/bin/python" -u -m alignx_jax.train "$@" || code=$?
  kill "$copier" 2>/dev/null || true
  keep "$run/log" "$log" "$workdir"
  echo "$code" >"$run/code"
}

keep() { # LOG COPY WORKDIR: what was written so far, into the bucket
  cp "$1" "$2" || true
  find "$3" -maxdepth 2 \( -name 'metrics.jsonl' -o -name 'host_*.jsonl' -o -name 'events.out.*' \) \
    -exec sync {} + || true
}

alive() { # NAME
  [ -e "$base/runs/$1/lock" ] && ! flock -n -s "$base/runs/$1/lock" true
}

status() { # NAME
  if alive "$1"; then
    echo "$(hostname) running"
  elif [ -e "$base/runs/$1/code" ]; then
    echo "$(hostname) ended $(cat "$base/runs/$1/code")"
  else
    echo "$(hostname) none"
  fi
}

size() { stat -c %s "$base/runs/$1/log"; } # NAME

follow() { # NAME FROM
  # The caller counts what it shows, and may count too much where a connection was made twice.
  local from=$2 size
  size=$(size "$1")
  [ "$from" -le "$size" ] || from=$size
  tail -c "+$((from + 1))" -f "$base/runs/$1/log" &
  reader=$!
  trap 'kill "$reader" 2>/dev/null' EXIT
  while alive "$1" && kill -0 "$reader" 2>/dev/null; do sleep 1; done
  sleep 0.5 # for the last lines
}

stop() { # NAME SECONDS
  local run=$base/runs/$1 left=$2 pid
  alive "$1" || return 0
  # A second SIGTERM would end the training at once.
  pid=$(cat "$run/pid" 2>/dev/null || true)
  if [ -n "$pid" ] && [ "$(cat "$run/asked" 2>/dev/null)" != "$pid" ]; then
    echo "$pid" >"$run/asked"
    kill -TERM "$pid" 2>/dev/null || true
  fi
  while alive "$1"; do
    if [ "$left" -eq 0 ]; then
      kill -KILL "$pid" 2>/dev/null || true
      fail "the training of $1 had not stopped after $2 s and was killed"
    fi
    left=$((left - 1))
    sleep 1
  done
}

case ${1:-} in
  unpack | install | start | train | status | size | follow | stop) "$@" ;;
  *) fail "host.sh has no command '${1:-}'" ;;
esac
