#!/usr/bin/env bash
# Trains on whole nodes under Slurm, and goes on by itself: when the time is nearly up, or the job is
# preempted, every rank saves, and the job puts itself back into the queue.
#
#   sbatch --nodes 2 docs/slurm.sh imagenet-r18-node --data.train /local/train.beton --data.val /local/val.beton \
#       --run-dir /shared/runs/r18
#
# The run folder must be on a file system that the first node reaches after a requeue, too.
#SBATCH --job-name=pcl_fast
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append

set -uo pipefail
gpus=${SLURM_GPUS_ON_NODE:-8}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

stopped=0
stop() {
    stopped=1
    scancel --signal=TERM "$SLURM_JOB_ID" # the steps, not this script: torchrun passes it on to every rank
}
trap stop USR1 TERM

srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "$gpus" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    -m pcl_fast train "$@" &
step=$!

wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do # a signal interrupts `wait`, the step still saves
    wait "$step"
    code=$?
done

if [ "$stopped" = 1 ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
