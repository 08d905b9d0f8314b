#!/usr/bin/env bash
# Serves MLflow's pages and takes the records of runs, for this machine alone unless told otherwise.
#
#   slurm/mlflow_server.sh [--store FOLDER] [--host ADDRESS] [--port PORT] [--allow-remote] [-- ...]
#
# FOLDER (default: mlflow) is either one that runs recorded into directly (runs/NAME/mlflow), served
# as it is, or one for a database and pictures, made when it is not there. What follows -- goes to
# `mlflow server`. Needs all of MLflow: pip install mlflow
set -euo pipefail

store=mlflow host=127.0.0.1 port=5000 allow_remote=false

fail() {
    echo "error: $1" >&2
    exit 2
}

while (($# > 0)); do
    case $1 in
        --store | --host | --port)
            [[ -n ${2-} ]] || fail "$1 needs a value"
            declare "${1#--}=$2"
            shift 2
            ;;
        --allow-remote)
            allow_remote=true
            shift
            ;;
        --)
            shift
            break
            ;;
        *) fail "unknown option $1; known: --store --host --port --allow-remote, and -- before mlflow's own" ;;
    esac
done

if [[ ! $port =~ ^[0-9]{1,5}$ ]] || ((10#$port < 1 || 10#$port > 65535)); then
    fail "--port $port is not a port"
fi
for option in "$@"; do # they would overrule what is checked here
    case $option in
        --host | --host=* | -h* | --port | --port=* | -p*) fail "give $option before --" ;;
    esac
done
if [[ ! $host =~ ^(127\.[0-9]+\.[0-9]+\.[0-9]+|localhost|::1)$ ]] && ! "$allow_remote"; then
    fail "--host $host lets other machines in, and MLflow asks nobody for a password; keep 127.0.0.1 \
and use ssh -L, or add --allow-remote"
fi
command -v mlflow >/dev/null || fail "mlflow is not installed; run: pip install mlflow"

umask 077
mkdir -p "$store"
store=$(cd "$store" && pwd)
if compgen -G "$store/*/meta.yaml" >/dev/null; then
    export MLFLOW_ALLOW_FILE_STORE=true
    backend=$store
else
    backend=sqlite:///$store/mlflow.db
fi

echo "store: $backend" >&2
echo "from your own machine: ssh -N -L $port:127.0.0.1:$port ${USER:-USER}@$(hostname)" >&2
echo "then open http://127.0.0.1:$port, and record with: train.py --mlflow http://127.0.0.1:$port" >&2
exec mlflow server --host "$host" --port "$port" --backend-store-uri "$backend" \
    --artifacts-destination "$store/artifacts" "$@"
