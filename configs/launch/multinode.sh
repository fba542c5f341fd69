#!/bin/bash
# Start a job on one of several machines; run it on each of them, from the repository's root:
#
#   NNODES=2 MASTER=<the first machine's name> configs/launch/multinode.sh JOB.toml LOADER.toml [VALIDATION.toml] [FLAGS]
#
# Machines meet at MASTER:PORT. When a rank fails, all are started again, at most MAX_RESTARTS times, and go on from the
# last checkpoint. FLAGS are TorchTitan's, e.g. --training.steps=20.
#
# SIGTERM or SIGUSR1 lets all save a checkpoint and end. They have SHUTDOWN_SECONDS for that.

set -euo pipefail

job=${1:?the job config} loader=${2:?the loader config}
shift 2
validation=()
if [[ ${1:-} == *.toml || ${1:-} == *.yaml || ${1:-} == *.yml ]]; then
  validation=(--mosaic-validation-config "$1")
  shift
fi

exec torchrun \
  --nnodes="${NNODES:?how many machines}" \
  --nproc_per_node="${GPUS_PER_NODE:-8}" \
  --rdzv_backend=c10d \
  --rdzv_endpoint="${MASTER:?the first machine}:${PORT:-29400}" \
  --rdzv_id="${RUN_ID:-$(basename "$job" .toml)}" \
  --max-restarts="${MAX_RESTARTS:-3}" \
  --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  --shutdown-timeout="${SHUTDOWN_SECONDS:-240}" \
  -m examples.mosaic_streaming.train \
  --config "$job" --mosaic-config "$loader" "${validation[@]}" -- "$@"
