#!/bin/bash
# Start a job under Slurm, from the repository's root; the arguments are those of multinode.sh:
#
#   sbatch --nodes=8 configs/launch/slurm.sh JOB.toml LOADER.toml [VALIDATION.toml] [FLAGS]
#
# Before the time limit, or when it is preempted, the job saves a checkpoint, is put into the queue again, and goes on
# from there. It gets SIGTERM 300 s before the limit (--signal): longer than multinode.sh's SHUTDOWN_SECONDS.

#SBATCH --job-name=mosaic
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --exclusive
#SBATCH --time=2-00:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300
#SBATCH --output=%x-%j.log

# --cpus-per-task: all of a machine's; a step doesn't have it from the job (Slurm 22.05), so `srun` is told, too.

set -euo pipefail

source .venv/bin/activate

read -r MASTER < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER NNODES=$SLURM_JOB_NUM_NODES RUN_ID=$SLURM_JOB_ID

requeue() {
  kill -TERM "$step" 2>/dev/null || true    # srun passes it on, torchrun to its ranks, which save a checkpoint
  wait "$step" || true
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
}

step=""
trap requeue TERM USR1
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 configs/launch/multinode.sh "$@" &
step=$!
wait "$step"
