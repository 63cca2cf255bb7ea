#!/usr/bin/env bash
# Train on several GPUs of one machine, or of several (docs/cluster.md).
set -euo pipefail

usage() {
    cat >&2 <<TEXT
usage: $0 CONFIG GPUS [options of tools/train.py]
  CONFIG         config file
  GPUS           processes on this machine, one per GPU
environment:
  PORT           port of the first machine (default 29500); two trainings on one machine need two
  NNODES         number of machines (default 1); with more, run this on each of them, with
  NODE_RANK        the number of this machine, counted from 0, and
  MASTER_ADDR      name or address of machine 0
  RDZV_ENDPOINT  HOST:PORT of one machine, instead of NODE_RANK, MASTER_ADDR and PORT: machines number themselves
  RDZV_ID        name of the training, to tell it from others at that place (default prune_mm)
  MAX_RESTARTS   on one machine: how often all processes are started again after one has died (default 0); give
                 --resume, too
  PYTHON         interpreter (default python)
TEXT
    exit 2
}

fail() {
    echo "error: $1" >&2
    exit 2
}

[ $# -ge 2 ] || usage
CONFIG=$1
GPUS=$2
NNODES=${NNODES:-1}
[[ $GPUS =~ ^[1-9][0-9]*$ ]] || fail "GPUS='$GPUS' must be a number of processes, such as 8"
[[ $NNODES =~ ^[1-9][0-9]*$ ]] || fail "NNODES='$NNODES' must be a number of machines, such as 2"
if [ "$NNODES" -gt 1 ] && [ "${MAX_RESTARTS:-0}" != 0 ]; then
    fail "MAX_RESTARTS=$MAX_RESTARTS is for one machine; after a failure of one of several start all again, with --resume"
fi

if [ -n "${RDZV_ENDPOINT:-}" ]; then
    WHERE=(--rdzv_backend=c10d --rdzv_endpoint="$RDZV_ENDPOINT" --rdzv_id="${RDZV_ID:-prune_mm}")
else
    if [ "$NNODES" -gt 1 ] && { [ -z "${MASTER_ADDR:-}" ] || [ -z "${NODE_RANK:-}" ]; }; then
        fail "NNODES=$NNODES needs MASTER_ADDR (machine 0) and NODE_RANK (this machine, from 0), or RDZV_ENDPOINT"
    fi
    WHERE=(
        --node_rank="${NODE_RANK:-0}" --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}"
    )
fi

exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="$NNODES" \
    --nproc_per_node="$GPUS" \
    --max_restarts="${MAX_RESTARTS:-0}" \
    "${WHERE[@]}" \
    "$(dirname "$0")/train.py" "$CONFIG" --launcher pytorch "${@:3}"
