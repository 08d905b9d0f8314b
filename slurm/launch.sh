# Sourced by the job scripts, in the folder of the checkout: starts train.py on every node of the
# job, continues a run that the folder holds already, and has it saved and requeued before the time
# limit. Expects RUN_DIR, and TRAIN, an array of train.py's other options.
# shellcheck shell=bash
set -euo pipefail

: "${RUN_DIR:?the run folder, on a disk that all nodes see}"
: "${SLURM_JOB_ID:?submit this script with sbatch}"
: "${SLURM_GPUS_ON_NODE:?the job has no GPUs; ask for them with --gpus-per-node}"

if [[ -f .venv/bin/activate ]]; then
    # shellcheck disable=SC1091
    source .venv/bin/activate
fi

nodes=${SLURM_NNODES:-1}
processes=$((nodes * SLURM_GPUS_ON_NODE))
threads=$((${SLURM_CPUS_PER_TASK:-1} / SLURM_GPUS_ON_NODE))
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not inherit it since Slurm 22.05

# Every value that accelerate would otherwise take from a user's `accelerate config`.
launch=(
    --num_processes "$processes" --num_machines "$nodes" --gpu_ids all
    --mixed_precision no --dynamo_backend no # train.py decides both
    --num_cpu_threads_per_process "$((threads > 0 ? threads : 1))"
    --main_process_port "$((15000 + SLURM_JOB_ID % 15000))" # jobs that share a node differ
)
if ((processes > 1)); then
    launch+=(--multi_gpu)
fi
if ((nodes > 1)); then
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    launch+=(--main_process_ip "${hosts%%$'\n'*}" --same_network)
fi

options=(--output-dir "$RUN_DIR" "${TRAIN[@]}")
if [[ -f $RUN_DIR/run.json ]]; then
    options+=(--resume)
fi

# Slurm sends signals to all processes of a step. Launchers must not die of SIGTERM, nor pass it on:
# train.py would get it twice, which means "at once, without saving", and be killed after 30 s.
# Ignored signals stay ignored in what is started; train.py sets its own handler.
export PET_SIGNALS_TO_HANDLE=SIGHUP # of torch's launcher
export PET_SHUTDOWN_TIMEOUT=240     # seconds for the others to save when one process has ended
# shellcheck disable=SC2016  # expanded on each node
on_node='trap "" TERM; exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"'

# Before the time limit (#SBATCH --signal) this shell gets SIGUSR1: train.py saves and stops.
stopping=false
# shellcheck disable=SC2329  # called by the trap
save_and_stop() {
    stopping=true
    echo "time is nearly up: saving" >&2
    # to the steps alone, not to this shell
    scancel --signal=TERM "$SLURM_JOB_ID" || echo "scancel failed: the last checkpoint counts" >&2
}
trap save_and_stop USR1
trap 'echo "SIGTERM: waiting for train.py to save" >&2' TERM # preempted or cancelled

srun --wait=300 bash -c "$on_node" launch "${launch[@]}" train.py "${options[@]}" &
step=$!
while kill -0 "$step" 2>/dev/null; do # a signal ends `wait`, not the step
    wait "$step" || true
done
status=0
wait "$step" || status=$? # bash remembers it

if "$stopping" && ((status != 0)); then
    echo "stopped; the job is requeued and continues the run in $RUN_DIR" >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
