#!/usr/bin/env bash
# Train under Slurm, in the foreground (docs/cluster.md). tools/slurm_train.sbatch is the batch job around it.
set -euo pipefail

usage() {
    cat >&2 <<TEXT
usage: $0 PARTITION JOB_NAME CONFIG [WORK_DIR] [options of tools/train.py]
environment:
  GPUS           processes in all, one per GPU (default 8)
  GPUS_PER_NODE  of them on one machine (default 8, or GPUS if that is less)
  CPUS_PER_TASK  processor cores per process, for data loading (default 5)
  SRUN_ARGS      further options of srun, such as '--time=2-00:00:00 --qos=high'
  MASTER_PORT    port of the first process (default: a random one, so that jobs can share a machine)
  PYTHON         interpreter (default python)
TEXT
    exit 2
}

fail() {
    echo "error: $1" >&2
    exit 2
}

[ $# -ge 3 ] || usage
PARTITION=$1
JOB_NAME=$2
CONFIG=$3
shift 3
WORK_DIR=()
if [ $# -gt 0 ] && [[ $1 != -* ]]; then
    WORK_DIR=(--work-dir "$1")
    shift
fi

GPUS=${GPUS:-8}
[[ $GPUS =~ ^[1-9][0-9]*$ ]] || fail "GPUS='$GPUS' must be a number of processes, such as 8"
GPUS_PER_NODE=${GPUS_PER_NODE:-$((GPUS < 8 ? GPUS : 8))}
[[ $GPUS_PER_NODE =~ ^[1-9][0-9]*$ ]] || fail "GPUS_PER_NODE='$GPUS_PER_NODE' must be a number, such as 8"
[ $((GPUS % GPUS_PER_NODE)) -eq 0 ] || fail "GPUS=$GPUS must be a multiple of GPUS_PER_NODE=$GPUS_PER_NODE"
export MASTER_PORT="${MASTER_PORT:-$((20000 + RANDOM % 10000))}"
read -r -a SRUN_OPTIONS <<<"${SRUN_ARGS:-}"

# One process that dies must end the others, which would wait for it; --resume starts all of them again.
exec srun \
    --partition="$PARTITION" \
    --job-name="$JOB_NAME" \
    --nodes="$((GPUS / GPUS_PER_NODE))" \
    --ntasks="$GPUS" \
    --ntasks-per-node="$GPUS_PER_NODE" \
    --gres="gpu:$GPUS_PER_NODE" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 \
    ${SRUN_OPTIONS[@]+"${SRUN_OPTIONS[@]}"} \
    "${PYTHON:-python}" -u "$(dirname "$0")/train.py" "$CONFIG" ${WORK_DIR[@]+"${WORK_DIR[@]}"} --launcher slurm "$@"
