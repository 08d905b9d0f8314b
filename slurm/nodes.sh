#!/usr/bin/env bash
# Trains on several nodes of eight GPUs.
# Submit from the folder of the checkout: sbatch slurm/nodes.sh [options of train.py]
#
# Edit for your cluster (and, if it asks for them, remove a '#' from the next two):
##SBATCH --account=NAME
##SBATCH --partition=NAME
#SBATCH --time=24:00:00
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=256G
#
# Leave these:
#SBATCH --job-name=nsp
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}"

# Edit where NCCL chooses a slow network by itself:
# export NCCL_SOCKET_IFNAME=ib0

# Edit: what to train and where; the folder must be on a disk that outlives the job.
RUN_DIR=${RUN_DIR:-runs/emoji}
TRAIN=(--preset emoji --parallel fsdp "$@")

source slurm/launch.sh
