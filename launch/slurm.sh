#!/usr/bin/env bash
# Trains on GPU nodes under SLURM, one process a GPU.
#
#   sbatch --nodes=4 launch/slurm.sh --config=configs/emoji.py \
#       --config.data.cache=/shared/cache --workdir=/shared/runs/emoji
#
# The repository, its .venv, the latent cache and the workdir must lie where all nodes see them.
#SBATCH --job-name=ldm_jax
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# SIGTERM to every task 120 s before the time is up: the run saves and ends.
#SBATCH --signal=TERM@120
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

# SLURM itself queues the job again when a node fails or a job of higher priority takes its place.
# When the time is up the run ends well, unfinished, and says so: then this script asks for it.
output=$(mktemp)
srun --kill-on-bad-exit=1 .venv/bin/python train.py --cluster=slurm "$@" 2>&1 | tee "$output"
if grep -q 'SIGTERM: stopped after step' "$output"; then
    scontrol requeue "$SLURM_JOB_ID"
fi
