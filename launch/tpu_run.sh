#!/usr/bin/env bash
# Trains on a TPU pod, from asking for it to deleting it.
#
#   launch/tpu_run.sh --name=NAME --type=v5litepod-64 --zone=ZONE --project=PROJECT \
#     --config=configs/X.py --workdir=gs://BUCKET/RUN [OPTIONS] [-- --config.FIELD=VALUE ...]
#
# Compiles the program for that topology, asks for a queued resource, waits for it, copies the
# commit, installs it, starts the training on all hosts and shows the first one's log. After a
# preemption it asks again and the training goes on. At the end, or on Ctrl-C, it says what it costs
# and deletes the pod. Run it again at any moment: it goes on with what is there.
#
#   --spot          preemptible chips, at a lower price
#   --slices=N      N slices of that type, as one run (set --config.mesh.replica to a multiple)
#   --keep          does not delete the pod; Ctrl-C then leaves the training running
#   --dirty         takes changes that are not committed too (new files must be added)
#   --skip-compile  does not compile beforehand
#   --dry-run       prints the commands that change something, and does nothing
#
# What follows -- is given to python -m alignx_jax.train. Whatever in it says gs://BUCKET/PATH is read
# from there. The log of each host is kept in WORKDIR/launch_logs.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"

spot='' keep='' skip_compile=''
parse_options "name type zone project config workdir slices" "spot keep dirty skip-compile dry-run" "$@"
require name type zone project config workdir
check_workdir_name
look_up_type
cd "$ROOT"
asked='' # whether this run of the script asked for the pod
early=0  # how often a training stopped soon after its start

main() {
  take_code
  command=$(quoted "$code" --config="$config" ${rest[@]+"${rest[@]}"})
  if [ -z "$dry_run" ]; then
    check_gcloud
    check_workdir
    check_zone
    hold_key
  fi
  compile
  trap interrupted INT TERM
  while true; do
    get_pod
    started=$(date +%s)
    if prepare && start; then
      watch_training
      decide
    else
      outcome=gone # or it will be; get_pod sees
      [ -z "$dry_run" ] || exit 1
    fi
    if [ "$outcome" = again ] && [ $(($(date +%s) - started)) -lt 120 ]; then
      early=$((early + 1))
      [ "$early" -lt 5 ] || finish "The training stopped within two minutes of its start, five times." 1
    fi
    case $outcome in
      done) break ;;
      gone) say "The pod is gone or going; asking for it again." ;;
      again) say "The training saved and stopped, on a pod that is still there; starting it again." ;;
      failed) finish "The training failed; its log is above and in $workdir/launch_logs." 1 ;;
    esac
    [ -n "$dry_run" ] || sleep "$POLL_SECONDS"
  done
  if [ -z "$dry_run" ]; then
    printf '%s\n' "$command" | gcloud storage cp --quiet - "$finished" 2>"$scratch/cp" ||
      say "Could not write $finished: $(tail -n 1 "$scratch/cp")"
  fi
  finish "The training has finished; what it made is in $workdir." 0
}

check_workdir() {
  finished=$workdir/launch_$name.txt
  if [ "$(gcloud storage cat "$finished" 2>/dev/null)" = "$command" ]; then
    say "This training has finished already, by the same commit and command; nothing was started."
    [ "$(pod_state)" = NONE ] || { finish "Its pod $name is still there." 0; }
    exit 0
  fi
  echo "$command" | gcloud storage cp --quiet - "$workdir/launch_probe.txt" 2>"$scratch/cp" ||
    fail "$workdir cannot be written to: make the bucket (gcloud storage buckets create" \
      "gs://$(cut -d/ -f3 <<<"$workdir") --location=${zone%-*} --project=$project" \
      "--uniform-bucket-level-access --enable-hierarchical-namespace, in which checkpoints are renamed" \
      "at once) or ask for the role roles/storage.objectUser on it. gcloud said: $(tail -n 1 "$scratch/cp")"
  gcloud storage rm --quiet "$workdir/launch_probe.txt" 2>/dev/null || true
}

check_zone() {
  tpus accelerator-types list --filter="type=$type" --format='value(type)' \
    >"$scratch/types" 2>"$scratch/error" || explain "$scratch/error"
  grep -qx "$type" "$scratch/types" ||
    fail "Zone $zone has no $type; see gcloud compute tpus locations list and gcloud compute tpus" \
      "accelerator-types list --zone=ZONE, and take another --zone or --type."
}

# Whether the program fits, before anything is paid for; remembered by commit and command.
compile() {
  local made argument arguments=() python=${PYTHON:-python} status=0
  [ -z "$skip_compile" ] || return 0
  for argument in ${rest[@]+"${rest[@]}"}; do
    case $argument in --config.*) arguments+=("$argument") ;; esac
  done
  made=${XDG_CACHE_HOME:-$HOME/.cache}/alignx_jax/compile/$(
    quoted "$topology" "$slices" "$command" | git hash-object --stdin
  )
  if [ -n "$dry_run" ]; then
    quoted "$python" -m alignx_jax.compile --config="$config" --workdir="$made" \
      --topology="$topology" --slices="$slices" ${arguments[@]+"${arguments[@]}"}
    return 0
  fi
  [ ! -e "$made/fits" ] || return 0
  command -v "$python" >/dev/null ||
    fail "There is no $python to compile the program with; activate the environment of this" \
      "package, or give --skip-compile."
  mkdir -p "$made"
  say "Compiling the program for $slices × $topology on this machine, which takes minutes..."
  "$python" -m alignx_jax.compile --config="$config" --workdir="$made" --topology="$topology" \
    --slices="$slices" ${arguments[@]+"${arguments[@]}"} || status=$?
  case $status in
    0) : >"$made/fits" ;;
    2) fail "The program does not fit on $slices × $type (above: which knob helps). Nothing was asked for." ;;
    *) fail "The program could not be compiled, as it says above. Nothing was asked for;" \
      "--skip-compile leaves this out." ;;
  esac
}

request() {
  local arguments=()
  if [ "$slices" -eq 1 ]; then
    arguments+=(--node-id="$name")
  else
    arguments+=(--node-count="$slices" --node-prefix="$name")
  fi
  [ -z "$spot" ] || arguments+=(--spot)
  tpus queued-resources create "$name" --accelerator-type="$type" \
    --runtime-version="$runtime" "${arguments[@]}"
}

# Waits until the pod is there, asking for it if need be; sets pod, its state.
get_pod() {
  local text last='' began now found count
  if [ -n "$dry_run" ]; then
    request
    pod_state
    return 0
  fi
  began=$(date +%s)
  while true; do
    pod=$(pod_state)
    text=$pod
    case $pod in
      NONE | UNKNOWN) [ "$pod" = NONE ] || text="UNKNOWN ($(tail -n 1 "$scratch/state"))" ;;
      *)
        IFS=$'\t' read -r _ found count <"$scratch/pod"
        [ "$found" = "$type" ] && [ "${count:-1}" -eq "$slices" ] ||
          fail "$name is ${count:-1} × $found, not $slices × $type; use another --name, or delete it:" \
            "launch/tpu_delete.sh --name=$name --zone=$zone --project=$project"
        ;;
    esac
    if [ "$pod" = ACTIVE ]; then
      node_states >"$scratch/nodes"
      text="ACTIVE ($(xargs <"$scratch/nodes"))"
    fi
    if [ "$text" != "$last" ]; then
      say "$name: $text"
      last=$text
    elif [ -t 2 ]; then
      now=$(date +%s)
      printf '\r%s for %d min %02d s \r' "$pod" $(((now - began) / 60)) $(((now - began) % 60)) >&2
    fi
    case $pod in
      NONE)
        say "Asking for $(cost)."
        request >"$scratch/create" 2>&1 || explain "$scratch/create"
        asked=yes
        continue
        ;;
      FAILED)
        tpus queued-resources describe "$name" --format='value(state.failedData.error.message)' \
          >"$scratch/error" 2>&1 || true
        delete_pod
        # One of an earlier day may be asked for again.
        [ -z "$asked" ] || explain "$scratch/error"
        ;;
      SUSPENDING | SUSPENDED) delete_pod ;;
      ACTIVE)
        grep -qv ' READY$' "$scratch/nodes" || return 0
        ! grep -qE ' (PREEMPTED|TERMINATED|STOPPED)$' "$scratch/nodes" || delete_pod
        ;;
    esac
    sleep "$POLL_SECONDS"
  done
}

# Copies and installs the code on all hosts. Machines that just came may refuse at first.
prepare() {
  local node tries
  say "Copying commit $code to the hosts and installing it..."
  for tries in 1 2 3 4 5; do
    if copy && on_hosts "unpack $code" 2>"$scratch/error" && on_hosts "install $code" 2>"$scratch/error"; then
      return 0
    fi
    say "Not every host is ready yet: $(tail -n 1 "$scratch/error")"
    [ -z "$dry_run" ] && [ "$(pod_state)" = ACTIVE ] || return 1
    sleep "$POLL_SECONDS"
  done
  cat "$scratch/error" >&2
  finish "The code could not be installed." 1
}

copy() {
  local node
  for node in $(node_names); do
    tpus tpu-vm scp "$archive" "$LAUNCH/host.sh" "$node:" --worker=all 2>"$scratch/error" ||
      return 1
    on_node "$node" all "mkdir -p $(dirname $HOST_SCRIPT) && mv host.sh $HOST_SCRIPT" \
      2>"$scratch/error" || return 1
  done
}

start() {
  on_hosts "start $name $(quoted "$code" "$workdir" --config="$config" ${rest[@]+"${rest[@]}"})" \
    >"$scratch/start" 2>"$scratch/error" || {
    if grep -q '^Error on ' "$scratch/error"; then
      grep '^Error on ' "$scratch/error" | sort -u | head -n 3 >&2
      # Somebody else's is left alone.
      ! grep -q ' trains something else' "$scratch/error" || exit 1
      finish "The training could not be started." 1
    fi
    return 1
  }
  if [ -n "$dry_run" ]; then cat "$scratch/start"; else say "$(sort "$scratch/start" | xargs)"; fi
}

# Shows the log of the first host until the training ends there or the host is gone.
watch_training() {
  local first from=0 node
  node=$(node_names | head -n 1)
  if [ -n "$dry_run" ]; then
    on_node "$node" 0 "bash $HOST_SCRIPT follow $name 0"
    return 0
  fi
  if grep -q ' runs already$' "$scratch/start"; then
    first=$(on_node "$node" 0 "bash $HOST_SCRIPT size $name" 2>/dev/null) || return 0
    from=$((first > 3000 ? first - 3000 : 0))
    say "The training runs already; the end of its log:"
  fi
  : >"$scratch/log"
  while true; do
    on_node "$node" 0 "bash $HOST_SCRIPT follow $name $((from + $(wc -c <"$scratch/log")))" \
      2>"$scratch/error" | tee -a "$scratch/log" || true
    [ "$(pod_state)" = ACTIVE ] || return 0
    hosts_say
    # A connection may break while the training runs.
    grep -q ' running$' "$scratch/status" || return 0
    sleep "$POLL_SECONDS"
  done
}

# Sets answered, whether all hosts did; what they said is in the file status.
hosts_say() {
  answered=yes
  on_hosts "status $name" >"$scratch/status" 2>"$scratch/error" || answered=''
}

# Sets outcome: done, again, gone or failed.
decide() {
  local tries began
  if [ -n "$dry_run" ]; then
    outcome='done'
    on_hosts "status $name"
    return 0
  fi
  for tries in 1 2 3 4; do
    pod=$(pod_state)
    outcome=gone
    [ "$pod" = ACTIVE ] || return 0
    hosts_say
    # The other hosts end a while after the first; one that hangs is not waited for without end.
    began=$(date +%s)
    while [ -n "$answered" ] && grep -q ' running$' "$scratch/status"; do
      [ $(($(date +%s) - began)) -lt "$STOP_SECONDS" ] || stop_training
      sleep "$POLL_SECONDS"
      hosts_say
    done
    [ -n "$answered" ] || return 0
    outcome='done'
    grep -qv ' ended 0$' "$scratch/status" || return 0
    # 75: asked to stop, and saved; 143: asked to before it could; none: the machine was restarted.
    outcome=again
    ! grep -qE ' (ended (75|143)|none)$' "$scratch/status" || return 0
    # What fails may fail because a host is being taken away.
    outcome=failed
    sleep "$POLL_SECONDS"
  done
  sort "$scratch/status" | head -n 20 >&2
}

# Says what there is and costs, deletes it unless --keep, and ends.
finish() { # TEXT EXIT_CODE
  if [ -n "$dry_run" ]; then
    [ -n "$keep" ] || delete_pod
    exit "$2"
  fi
  say "$1"
  say "$name in $zone: $(cost)."
  if [ -n "$keep" ]; then
    say "It was kept. Delete it with launch/tpu_delete.sh --name=$name --zone=$zone --project=$project"
  else
    say "Deleting it..."
    delete_pod
    say "$name is deleted; nothing of it costs any more."
  fi
  exit "$2"
}

# shellcheck disable=SC2329 # by a trap
interrupted() {
  local pids
  trap 'say "Left as it is: $name, $(cost). Run the same command again to go on."; exit 130' INT TERM
  pids=$(jobs -p)
  # shellcheck disable=SC2086
  [ -z "$pids" ] || kill $pids 2>/dev/null || true
  echo >&2
  [ -z "$keep" ] || finish "Stopped watching; what runs goes on." 130
  pod=$(pod_state)
  [ "$pod" != NONE ] || exit 130
  if [ "$pod" = ACTIVE ]; then
    say "Press Ctrl-C again to leave everything running."
    stop_training
  fi
  finish "Stopped; the same command goes on from what was saved." 130
}

main
