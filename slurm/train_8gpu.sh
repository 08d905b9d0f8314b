#!/usr/bin/env bash
# Trains what a file describes on the eight GPUs of one node.
# Submit from the folder of the checkout:
#   sbatch slurm/train_8gpu.sh [configs/FILE.yaml, default: configs/base.yaml] [options of train.py]
#
# Edit for your cluster (and, if it asks for them, remove a '#' from the next two):
##SBATCH --account=NAME
##SBATCH --partition=NAME
#SBATCH --time=72:00:00
#SBATCH --cpus-per-task=64
#SBATCH --mem=500G
#
# Leave these:
#SBATCH --job-name=nsp
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}"

config=configs/base.yaml
if [[ ${1--} != -* ]]; then
    config=$1
    shift
fi
name=$(basename "$config")

# Edit: where to train; the folder must be on a disk that outlives the job.
RUN_DIR=${RUN_DIR:-runs/${name%.*}}
TRAIN=(--config "$config" --parallel ddp "$@")

source slurm/launch.sh
