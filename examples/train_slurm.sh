#!/bin/bash
# Several hosts under Slurm: one torchrun a host, eight processes each, one run.
#
#   sbatch examples/train_slurm.sh codes --depth 30 --name d30 --parallel hsdp
#
# All arguments go to `varcli train`. Codes and run folder must be on a disk that every host sees. Two minutes before the time
# limit the run saves its state and the job is put in the queue again; the next one goes on. What it costs: rate and GPU-hours
# stand in the log after 20 steps. The script was checked with stand-ins for srun and scontrol, on no cluster of ours.
#SBATCH --job-name=varcli
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=varcli-%j.log

set -u
first_host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=8
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100  # seconds a newer torchrun leaves the processes to save; older ones leave 30

srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc-per-node 8 \
    --rdzv-backend c10d \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-endpoint "$first_host:29500" \
    -m varcli train "$@" &
job=$!
is_time_up=0
trap 'is_time_up=1; kill -TERM "$job"' TERM
wait "$job"
code=$?
if [ "$is_time_up" = 1 ]; then
    wait "$job"  # the trap ended the first wait; the processes are saving now
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
