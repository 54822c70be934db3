#!/usr/bin/env bash
# Says what a pod is doing and what it costs; changes nothing.
#
#   launch/tpu_status.sh --name=NAME --zone=ZONE --project=PROJECT
#
# Ends with 1 if there is no such pod.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"
parse_options "name zone project" "" "$@"
require name zone project
check_gcloud
pod=$(pod_state)
echo "$name: $pod"
[ "$pod" != NONE ] || exit 1
[ "$pod" != UNKNOWN ] || fail "gcloud could not be asked: $(cat "$scratch/state")"
take_shape
look_up_type
node_states | sed 's/^/  /'
cost
if [ "$pod" = ACTIVE ]; then
  hold_key
  on_hosts "status $name" 2>"$scratch/error" | sort ||
    echo "Not every host answered: $(tail -n 1 "$scratch/error")"
else
  echo "Only TPUs that are there cost something."
fi
