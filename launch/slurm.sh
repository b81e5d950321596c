#!/usr/bin/env bash
# Trains on GPU nodes under SLURM, one process a GPU.
#
#   sbatch --nodes=4 launch/slurm.sh --config=configs/emoji.py --workdir=/shared/runs/emoji
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
# A killed or preempted job is queued again with this same command and goes on by itself.
exec srun --kill-on-bad-exit=1 .venv/bin/python train.py --cluster=slurm "$@"
