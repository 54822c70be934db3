#!/usr/bin/env bash
# Lets the training save, then deletes a pod. Does nothing where there is none.
#
#   launch/tpu_delete.sh --name=NAME --zone=ZONE --project=PROJECT [--now] [--dry-run]
#
#   --now  does not wait for the training to save
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"
now=''
parse_options "name zone project" "now dry-run" "$@"
require name zone project

if [ -n "$dry_run" ]; then
  [ -n "$now" ] || on_hosts "stop $name $STOP_SECONDS"
  delete_pod
  exit
fi
check_gcloud
pod=$(pod_state)
if [ "$pod" = NONE ]; then
  echo "There is no $name in $zone of project $project; nothing to delete."
  exit
fi
if [ -z "$now" ] && [ "$pod" = ACTIVE ]; then
  take_shape
  hold_key
  stop_training
fi
delete_pod
echo "$name is deleted; nothing of it costs any more."
