#!/usr/bin/env bash
# Prints a JobSet that trains on GKE, from the options of tpu_run.sh.
#
#   launch/gke_jobset.sh --name=NAME --type=v5litepod-64 --project=PROJECT --config=configs/X.py \
#     --workdir=gs://BUCKET/RUN [--slices=N] [--spot] [--image=IMAGE] [--service-account=ACCOUNT] \
#     [--dirty] [--dry-run] [-- --config.FIELD=VALUE ...] | kubectl apply -f -
#
# The cluster needs JobSet, a node pool of that type for each slice, and the Cloud Storage FUSE driver.
# The commit is put beside the workdir, and installed when a pod starts. A preempted training is
# started again as a whole, and goes on. With --dry-run nothing is copied.
#
#   --image            with Python 3.11 or newer (python:3.11)
#   --service-account  of Kubernetes, which may write to the buckets (default)
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"
spot='' image=python:3.11 service_account=default
parse_options "name type project config workdir slices image service-account" "spot dirty dry-run" "$@"
require name type project config workdir
check_workdir_name
look_up_type
cd "$ROOT"
take_code >&2

kept=$workdir/launch_code/code-$code.tar.gz
if [ -z "$dry_run" ]; then
  check_gcloud
  gcloud storage cp --quiet --project="$project" "$archive" "$kept" >&2 ||
    fail "$kept could not be written; see what gcloud said above."
fi

# A string of YAML.
quote="'"
text() { printf "'%s'" "${1//$quote/$quote$quote}"; }

# gs://BUCKET/PATH as a pod has it, and a line with each bucket.
arguments=() buckets=''
for argument in "$kept" --workdir="$workdir" --config="$config" ${rest[@]+"${rest[@]}"}; do
  case $argument in
    *gs://*)
      path=${argument#*gs://}
      buckets="$buckets${path%%/*}"$'\n'
      argument=${argument%%gs://*}/gcs/$path
      ;;
  esac
  arguments+=("$argument")
done
buckets=$(printf %s "$buckets" | sort -u)
# As tpu_run.sh has it: hosts of up to 8 chips stand alone, those of larger slices have 4.
per_host=$((chips / hosts))

cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    # Each slice has a node pool for itself.
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    # Preempted, or asked to stop (exit code 75): all hosts start again, from the last checkpoint.
    maxRestarts: 50
  replicatedJobs:
  - name: slice
    replicas: $slices
    template:
      spec:
        parallelism: $hosts
        completions: $hosts
        backoffLimit: 0
        template:
          metadata:
            annotations:
              gke-gcsfuse/volumes: 'true'
          spec:
            restartPolicy: Never
            serviceAccountName: $service_account
            # For the step under way and its checkpoint.
            terminationGracePeriodSeconds: $STOP_SECONDS
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $gke_accelerator
              cloud.google.com/gke-tpu-topology: ${topology#*:}
YAML
if [ -n "$spot" ]; then
  cat <<YAML
              cloud.google.com/gke-spot: 'true'
            tolerations:
            - key: cloud.google.com/gke-spot
              operator: Equal
              value: 'true'
              effect: NoSchedule
YAML
fi
cat <<YAML
            containers:
            - name: train
              image: $(text "$image")
              ports:
              - containerPort: 8471 # between TPUs
              - containerPort: 8080 # between slices
              - containerPort: 8482 # JAX's coordinator
              securityContext:
                privileged: true
              command:
              - bash
              - -euc
              - |
                mkdir -p /code
                tar -xzf "\$0" -C /code
                cd /code/$code
                pip install --quiet -e '.[tpu,gguf]'
                # Signals are the trainer's.
                exec python -u -m alignx_jax.train "\$@"
YAML
for argument in "${arguments[@]}"; do echo "              - $(text "$argument")"; done
cat <<YAML
              resources:
                limits:
                  google.com/tpu: $per_host
              volumeMounts:
YAML
for bucket in $buckets; do
  printf '              - name: %s\n                mountPath: %s\n' "$(tr ._ -- <<<"$bucket")" "/gcs/$bucket"
done
echo "            volumes:"
for bucket in $buckets; do
  cat <<YAML
            - name: $(tr ._ -- <<<"$bucket")
              csi:
                driver: gcsfuse.csi.storage.gke.io
                volumeAttributes:
                  bucketName: $bucket
                  # As host.sh mounts it, and why.
                  mountOptions: implicit-dirs,metadata-cache:ttl-secs:0,write:enable-streaming-writes:false,file-system:rename-dir-limit:1000000
YAML
done
