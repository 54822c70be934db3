# shellcheck shell=bash
# What the scripts of this folder share; sourced, not run. Works with bash 3.2, macOS's.
#
# parse_options sets the options that are variables below.

LAUNCH=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck disable=SC2034
ROOT=$(dirname "$LAUNCH")
# Between two looks at the state of a request.
POLL_SECONDS=${POLL_SECONDS:-15}
# That a training which was asked to stop has for its step and its checkpoint.
STOP_SECONDS=${STOP_SECONDS:-300}
# On the hosts, below $HOME.
HOST_SCRIPT=alignx_jax/launch/host.sh

scratch=$(mktemp -d)
own_agent=''
trap 'rm -rf "$scratch"; [ -z "$own_agent" ] || ssh-agent -k >/dev/null' EXIT

name='' zone='' project='' type='' slices=1 config='' workdir='' dirty='' dry_run=''
rest=()

say() { printf '%s  %s\n' "$(date +%H:%M:%S)" "$*" >&2; }

fail() {
  printf 'Error: %s\n' "$*" >&2
  exit 1
}

# The comment at the head of a script is its help.
usage() { sed -n '2,/^[^#]/{ /^#/{ s/^# \{0,1\}//; p; }; }' "$0"; }

# parse_options "NAMES WITH A VALUE" "NAMES WITHOUT" ARGUMENTS...: sets variables of those names (- is
# written _), and rest to what follows --.
parse_options() {
  local with=" $1 " without=" $2 " option value
  shift 2
  while [ $# -gt 0 ]; do
    option=${1%%=*}
    case $1 in
      --) shift; rest=("$@"); return 0 ;;
      --help | -h) usage; exit 0 ;;
      --*) option=${option#--} ;;
      *) fail "What is '$1'? Options start with --; those of the training come after a lone --." ;;
    esac
    case $with in
      *" $option "*)
        if [ "$1" = "--$option" ]; then
          [ $# -gt 1 ] || fail "--$option needs a value."
          value=$2
          shift
        else
          value=${1#*=}
        fi
        [ -n "$value" ] || fail "--$option needs a value."
        ;;
      *)
        case $without in
          *" $1 "* | *" ${1#--} "*) value=yes ;;
          *) fail "There is no option $1; see $(basename "$0") --help. Options of the training come after a lone --." ;;
        esac
        ;;
    esac
    printf -v "${option//-/_}" %s "$value"
    shift
  done
}

require() {
  local option
  for option in "$@"; do
    [ -n "${!option}" ] || fail "--$option is missing; see $(basename "$0") --help."
  done
  [[ $name =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
    fail "--name is '$name'; take lower-case letters, digits and -, a letter first, at most 40."
}

# The words of a command as they can be pasted into a shell.
quoted() {
  local word text='' quote="'" in_quotes="'\\''"
  for word in "$@"; do
    case $word in
      *[!A-Za-z0-9_./:=,@%+~-]* | '') word="'${word//$quote/$in_quotes}'" ;;
    esac
    text="$text $word"
  done
  printf '%s\n' "${text# }"
}

# Runs a command; with --dry-run prints it.
run() {
  if [ -n "$dry_run" ]; then quoted "$@"; else "$@"; fi
}

check_workdir_name() {
  case $workdir in
    gs://?*/?*) workdir=${workdir%/} ;;
    *) fail "--workdir is '$workdir'; all hosts write to it: give gs://BUCKET/DIRECTORY." ;;
  esac
}

# The commit as an archive; sets code, its name on the hosts, and archive.
take_code() {
  local what changed new
  what=$(git rev-parse --verify --quiet HEAD) || fail "$ROOT is not a git checkout; clone it."
  code=${what:0:12}
  changed=$(git status --porcelain --untracked-files=no)
  new=$(git ls-files --others --exclude-standard -- alignx_jax configs launch setup.py)
  if [ -n "$changed$new" ]; then
    [ -n "$dirty" ] ||
      fail "The hosts get the last commit, and these differ from it: $(
        printf '%s\n' "$changed" "$new" | sed 's/^ *[A-Z?]* *//' | xargs
      ). Commit them, or give --dirty."
    if [ -n "$changed" ]; then
      what=$(git rev-parse "$(git stash create)^{tree}")
      code=${what:0:12}-dirty
    fi
  fi
  git cat-file -e "$what:${config%%:*}" 2>/dev/null ||
    fail "There is no file ${config%%:*} in the commit; give --config as a path from the repository's" \
      "root, and git add it."
  archive=$scratch/code-$code.tar.gz
  # Its paths in the archive begin with the name.
  run git archive --format=tar.gz --prefix="$code/" --output="$archive" "$what"
}

# Sets topology, generation, hosts, chips (of one slice), runtime, gke_accelerator and price.
# shellcheck disable=SC2034
look_up_type() {
  local row known
  row=$(grep "^$type"$'\t' "$LAUNCH/tpu_types.tsv") || {
    known=$(grep -v '^#' "$LAUNCH/tpu_types.tsv" | cut -f1 | tr '\n' ' ')
    fail "There is no --type '$type'; there are ${known% }."
  }
  IFS=$'\t' read -r _ topology hosts <<<"$row"
  generation=${topology%%:*}
  chips=${topology#*:}
  chips=$((${chips//x/*}))
  IFS=$'\t' read -r _ runtime gke_accelerator price <<<"$(
    grep "^$generation"$'\t' "$LAUNCH/tpu_generations.tsv"
  )"
  [[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices is '$slices'; give a number from 1."
}

# What the chips cost.
cost() {
  local dollars
  dollars=$(awk "BEGIN { printf \"%.2f\", $slices * $chips * $price }")
  echo "$((slices * chips)) $generation chips, about \$$dollars an hour (an estimate from list prices" \
    "on demand, launch/tpu_generations.tsv; Spot costs less)"
}

tpus() { run gcloud compute tpus "$@" --zone="$zone" --project="$project" --quiet; }

# Ends with what gcloud said, and what to do about it. Reads it from a file.
explain() {
  local said
  said=$(cat "$1")
  case $said in
    *[Qq]uota* | *RESOURCE_EXHAUSTED*)
      fail "Project $project has no quota for ${type:-this} in $zone: ask for it at" \
        "https://console.cloud.google.com/iam-admin/quotas?project=$project (service" \
        "tpu.googleapis.com; Spot has its own), or take another --zone or --type. gcloud said: $said"
      ;;
    *SERVICE_DISABLED* | *"has not been used in project"*)
      fail "Project $project does not use the TPU API yet; run: gcloud services enable" \
        "tpu.googleapis.com --project=$project"
      ;;
    *"not found in zone"* | *"could not be found in the zonal"* | *"nvalid location"* | *LOCATION_POLICY*)
      fail "Zone $zone has no ${type:-TPU} for project $project; see gcloud compute tpus locations" \
        "list, and take another --zone. gcloud said: $said"
      ;;
    *PERMISSION_DENIED* | *"does not have permission"*)
      fail "The account that gcloud uses may not do this in project $project: ask its owner for the" \
        "role roles/tpu.admin, or set --project. gcloud said: $said"
      ;;
    *) fail "gcloud refused: $said" ;;
  esac
}

check_gcloud() {
  command -v gcloud >/dev/null ||
    fail "gcloud is not installed; see https://cloud.google.com/sdk/docs/install, then run:" \
      "gcloud auth login"
  [ -n "$(gcloud auth list --filter=status:ACTIVE --format='value(account)' 2>/dev/null)" ] ||
    fail "gcloud is not logged in; run: gcloud auth login"
}

# gcloud reaches several hosts at once only with its key in an ssh-agent: sees to both.
hold_key() {
  local key=$HOME/.ssh/google_compute_engine code=0
  command -v ssh-add >/dev/null || fail "There is no ssh; install the OpenSSH client."
  if [ ! -f "$key" ]; then
    mkdir -p "$HOME/.ssh"
    ssh-keygen -q -t rsa -N '' -f "$key"
  fi
  ssh-add -l >"$scratch/keys" 2>&1 || code=$?
  if [ "$code" -eq 2 ]; then # no agent
    eval "$(ssh-agent -s)" >/dev/null
    own_agent=yes
  fi
  grep -qF "$(ssh-keygen -lf "$key" | cut -d' ' -f2)" "$scratch/keys" || ssh-add -q "$key" ||
    fail "$key could not be added to the ssh-agent; run: ssh-add $key"
}

# Prints the state of the queued resource: NONE if there is none, UNKNOWN if it could not be asked.
# The file pod has its state, type and number of slices, if that is more than one.
pod_state() {
  local node='tpu.nodeSpec[0]' fields
  fields="state.state,$node.node.acceleratorType.basename(),$node.multisliceParams.nodeCount"
  if tpus queued-resources describe "$name" --format="value($fields)" >"$scratch/pod" \
    2>"$scratch/state"; then
    cut -f1 "$scratch/pod"
    return 0
  fi
  case $(cat "$scratch/state") in
    *NOT_FOUND* | *"not found"* | *"does not exist"*) echo NONE ;;
    *PERMISSION_DENIED* | *SERVICE_DISABLED*) explain "$scratch/state" ;;
    *) echo UNKNOWN ;;
  esac
}

# Sets type and slices to those that pod_state saw.
take_shape() {
  IFS=$'\t' read -r _ type slices <"$scratch/pod"
  slices=${slices:-1}
}

# Prints each TPU that there should be and its state.
node_states() {
  local node
  for node in $(node_names); do
    echo "$node $(tpus tpu-vm describe "$node" --format='value(state)' 2>/dev/null || echo NONE)"
  done
}

# Names of the TPUs that there should be, one a slice.
node_names() {
  local slice
  if [ "$slices" -eq 1 ]; then
    echo "$name"
  else
    for ((slice = 0; slice < slices; slice++)); do echo "$name-$slice"; done
  fi
}

on_node() { # NODE WORKER COMMAND
  # A host that has gone is noticed in a minute, and the ten times that gcloud tries again are short.
  tpus tpu-vm ssh "$1" --worker="$2" --ssh-flag=-oConnectTimeout=10 \
    --ssh-flag=-oServerAliveInterval=15 --ssh-flag=-oServerAliveCountMax=4 --command="$3"
}

# Runs a command of host.sh on all hosts of all slices at once; fails if one fails.
on_hosts() {
  local node pid pids='' code=0
  for node in $(node_names); do
    on_node "$node" all "bash $HOST_SCRIPT $1" &
    pids="$pids $!"
    [ -z "$dry_run" ] || wait "$!"
  done
  for pid in $pids; do wait "$pid" || code=$?; done
  return "$code"
}

# Asks the training to end its step and save, and waits for it.
stop_training() {
  say "Asked the training to save and stop; it has $STOP_SECONDS s."
  on_hosts "stop $name $STOP_SECONDS" 2>"$scratch/stop" ||
    say "Not every host answered: $(tail -n 1 "$scratch/stop")"
}

# Deletes the queued resource and its TPUs, and waits until they are gone.
delete_pod() {
  local tries
  for tries in 1 2 3; do
    if tpus queued-resources delete "$name" --force >"$scratch/delete" 2>&1; then
      [ -z "$dry_run" ] || cat "$scratch/delete"
      return 0
    fi
    [ "$(pod_state)" != NONE ] || return 0
    [ "$tries" -eq 3 ] || sleep "$POLL_SECONDS"
  done
  fail "$name could not be deleted and may cost money: $(cat "$scratch/delete"). Try again:" \
    "launch/tpu_delete.sh --name=$name --zone=$zone --project=$project"
}
