#!/usr/bin/env bash
# Runs a program on all GPUs of one or many hosts, the same line on each: launch/torchrun.sh [--dry-run] PROGRAM ...
# PROGRAM is a torchrun program, e.g. `-m sharded_lamb.bert --config configs/bert-large-phase1.yaml`. Settings, from the environment:
#   NNODES          hosts, or MIN:MAX to continue with fewer (1)    NPROC_PER_NODE  processes a host (its GPUs, else 1)
#   RDZV            static or c10d (static)                      NODE_RANK       of this host, static only (0)
#   MASTER_ADDR     the first host, as others reach it           MASTER_PORT     (29500)
#   RDZV_ID         of this job, c10d only (sharded-lamb)        IS_HOST         1 on the first host, 0 elsewhere: if names do not resolve
#   INTERFACE       network interface that ranks talk over       LOCAL_ADDR      this host's address, if its name does not resolve
#   MAX_RESTARTS    after a rank has failed (3)                  LOG_DIR         torchrun's logs per rank
#   PREFLIGHT       0 skips the preflight (1)                    PREFLIGHT_ARGS  more of its arguments
set -euo pipefail
# shellcheck source=launch/_help.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_help.sh"
# shellcheck source=launch/_env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_env.sh"
# shellcheck source=launch/_ranks.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_ranks.sh"

dry_run=
if [[ ${1:-} == --dry-run ]]; then
    dry_run=1
    shift
fi
(($#)) || die "what should run? e.g. launch/torchrun.sh -m sharded_lamb.bert --config configs/bert-large-phase1.yaml"

find_python
use_interface "${INTERFACE:-}"
nnodes=${NNODES:-1}
[[ $nnodes =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || die "NNODES must be a number or MIN:MAX, got '$nnodes'"
ranks=${NPROC_PER_NODE:-$(count_devices)}
[[ $ranks =~ ^[1-9][0-9]*$ ]] || die "NPROC_PER_NODE must be a number of processes, got '$ranks'; unset: one a GPU"
port=${MASTER_PORT:-29500}
torchrun=("$python" -m torch.distributed.run --nnodes="$nnodes" --nproc-per-node="$ranks" --max-restarts="${MAX_RESTARTS:-3}")
[[ $nnodes == 1 || -n ${MASTER_ADDR:-} ]] || die "NNODES=$nnodes needs MASTER_ADDR, the first host as the others reach it"
case ${RDZV:-static} in
static)
    [[ $nnodes != *:* ]] || die "NNODES=$nnodes needs RDZV=c10d: a static rendezvous waits for all hosts"
    [[ $nnodes == 1 || -n ${NODE_RANK:-} ]] || die "NNODES=$nnodes needs NODE_RANK, 0 on the first host, 1 on the next ..."
    torchrun+=(--node-rank="${NODE_RANK:-0}" --master-addr="${MASTER_ADDR:-127.0.0.1}" --master-port="$port")
    ;;
c10d)
    torchrun+=(--rdzv-backend=c10d --rdzv-id="${RDZV_ID:-sharded-lamb}" --rdzv-endpoint="${MASTER_ADDR:-127.0.0.1}:$port")
    [[ -z ${IS_HOST:-} ]] || torchrun+=(--rdzv-conf="is_host=$IS_HOST")
    ;;
*) die "RDZV must be static or c10d, got '$RDZV'" ;;
esac
[[ -z ${LOCAL_ADDR:-} ]] || torchrun+=(--local-addr="$LOCAL_ADDR")
logged=()
[[ -z ${LOG_DIR:-} ]] || logged=(--log-dir="$LOG_DIR" --tee=3)

# A preflight of a job that may shrink would wait for all its hosts.
if [[ ${PREFLIGHT:-1} == 1 && $nnodes != *:* ]]; then
    read -ra more <<<"${PREFLIGHT_ARGS:-}"
    preflight=("${torchrun[@]/#--max-restarts=*/--max-restarts=0}")
    preflight=("${preflight[@]/#--rdzv-id=*/--rdzv-id=${RDZV_ID:-sharded-lamb}-preflight}" -m sharded_lamb preflight --world-size="$((nnodes * ranks))" "${more[@]}")
    execute "${preflight[@]}"
fi
# exec: signals to this script (from a pod or a scheduler) reach torchrun, which forwards SIGTERM to ranks that save.
[[ -n $dry_run ]] || exec "${torchrun[@]}" "${logged[@]}" "$@"
execute "${torchrun[@]}" "${logged[@]}" "$@"
