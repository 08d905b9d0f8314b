#!/usr/bin/env bash
# Trains on one GPU.
# Submit from the folder of the checkout: sbatch slurm/one_gpu.sh [options of train.py]
#
# Edit for your cluster (and, if it asks for them, remove a '#' from the next two):
##SBATCH --account=NAME
##SBATCH --partition=NAME
#SBATCH --time=24:00:00
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#
# Leave these:
#SBATCH --job-name=nsp
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}"

# Edit: what to train and where; the folder must be on a disk that outlives the job.
RUN_DIR=${RUN_DIR:-runs/emoji}
TRAIN=(--preset emoji "$@")

source slurm/launch.sh
