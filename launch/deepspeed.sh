#!/usr/bin/env bash
# Runs a program with DeepSpeed's launcher, which connects to hosts by ssh: launch/deepspeed.sh [--dry-run] [OPTION ...] PROGRAM ...
# OPTION is any of deepspeed's (--include=node-0@node-1:0,2, --exclude=node-1:7, --num_nodes 2, --ssh_port 22 ...). PROGRAM is a script with its
# arguments, or `-m` and a module; "type": "ShardedLamb" is registered in it. Call it on one host, in a folder that exists on all hosts. Settings, from the environment:
#   HOSTFILE        hosts and their ranks, as launch/hostfile; without it, this machine's GPUs
#   MASTER_ADDR     the first host, as others reach it (asked by ssh)    MASTER_PORT     (29500)
#   INTERFACE       network interface that ranks talk over               NODE_RANK       of this host: without ssh, the same line on each host
#   PREFLIGHT       0 skips the preflight (1)                            PREFLIGHT_ARGS  more of its arguments
# Hosts receive this shell's NCCL_* and PYTHON*, the variables that INTERFACE sets, and the lines NAME=VALUE of ~/.deepspeed_env and ./.deepspeed_env.
set -euo pipefail
# shellcheck source=launch/_help.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_help.sh"
# shellcheck source=launch/_env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_env.sh"
# shellcheck source=launch/_ranks.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_ranks.sh"

dry_run=''
if [[ ${1:-} == --dry-run ]]; then
    dry_run=1
    shift
fi

options=()
module=()
launcher=pdsh
while [[ ${1:-} == -* ]]; do
    case $1 in
    -m | --module) module=(--module) ;;
    --no_python | --no_local_rank | --no_ssh | --no_ssh_check | --force_multi | --save_pid | --bind_cores_to_rank | --quiet | -q | --*=*)
        options+=("$1")
        ;;
    *)
        (($# > 1)) || die "$1 needs a value; deepspeed --help says which options there are"
        options+=("$1" "$2")
        shift
        ;;
    esac
    shift
done
(($#)) || die "what should run? e.g. launch/deepspeed.sh train.py --deepspeed --deepspeed_config ds.json"
for ((at = 0; at < ${#options[@]}; at++)); do
    [[ ${options[at]} != --launcher ]] || launcher=${options[at + 1]}
    [[ ${options[at]} != --launcher=* ]] || launcher=${options[at]#*=}
done

find_python
[[ -n $dry_run ]] || "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("deepspeed") is None)' ||
    die "$python cannot import deepspeed; install it on every host: pip install -c '$CONSTRAINTS' -e '${REPO_ROOT}[deepspeed]'"

hosts=0
if [[ -n ${HOSTFILE:-} ]]; then
    [[ -r $HOSTFILE ]] || die "there is no HOSTFILE $HOSTFILE; launch/hostfile shows what one is"
    while IFS= read -r line || [[ -n $line ]]; do
        [[ $line =~ ^[[:space:]]*(#|$) ]] && continue
        [[ $line =~ ^[[:space:]]*[^[:space:]]+[[:space:]]+slots=[0-9]+ ]] || die "HOSTFILE $HOSTFILE: '$line' is not 'NAME slots=RANKS'"
        ((hosts += 1))
    done <"$HOSTFILE"
    ((hosts)) || die "HOSTFILE $HOSTFILE names no host; a line is 'NAME slots=RANKS'"
    options=(--hostfile="$HOSTFILE" "${options[@]}")
fi
[[ -z ${MASTER_ADDR:-} ]] || options+=(--master_addr="$MASTER_ADDR")
options+=(--master_port="${MASTER_PORT:-29500}")
if [[ -n ${NODE_RANK:-} ]]; then
    [[ -n ${HOSTFILE:-} && -n ${MASTER_ADDR:-} ]] || die "NODE_RANK=$NODE_RANK needs HOSTFILE, and MASTER_ADDR, the first host as the others reach it"
    options+=(--no_ssh --node_rank="$NODE_RANK")
elif ((hosts)) && [[ -z $dry_run && " ${options[*]} " != *" --no_ssh "* ]]; then
    command -v -- ssh >/dev/null || die "no ssh on PATH; install it (Debian and Ubuntu: apt-get install openssh-client), or set NODE_RANK on each host"
    ((hosts == 1)) || [[ $launcher != pdsh ]] || command -v -- pdsh >/dev/null ||
        die "no pdsh on PATH; install it (Debian and Ubuntu: apt-get install pdsh), choose another --launcher, or set NODE_RANK on each host"
fi

use_interface "${INTERFACE:-}"
if [[ -n ${INTERFACE:-} && -z $dry_run ]]; then
    # DeepSpeed forwards NCCL's variables itself, and others only from this file.
    DS_ENV_FILE=$(mktemp)
    export DS_ENV_FILE
    trap 'rm -f -- "$DS_ENV_FILE"' EXIT
    cat -- ~/.deepspeed_env .deepspeed_env 2>/dev/null | grep '=' >"$DS_ENV_FILE" || true
    printf '%s_SOCKET_IFNAME=%s\n' NCCL "$INTERFACE" GLOO "$INTERFACE" TP "$INTERFACE" >>"$DS_ENV_FILE"
fi

# run COMMAND ...: in a separate process group, to which this script forwards SIGTERM.
run() {
    if [[ -n $dry_run ]]; then
        execute "$@"
        return
    fi
    set -m
    "$@" </dev/null &
    local child=$! status=0
    set +m
    # shellcheck disable=SC2064  # this child
    trap "kill -TERM -- -$child 2>/dev/null || true" TERM INT
    wait "$child" || status=$?
    while kill -0 -- "$child" 2>/dev/null; do
        status=0
        wait "$child" || status=$?
    done
    trap - TERM INT
    return "$status"
}

deepspeed=("${python%python}sharded-lamb-deepspeed" "${options[@]}")
if [[ ${PREFLIGHT:-1} == 1 ]]; then
    read -ra more <<<"${PREFLIGHT_ARGS:-}"
    run "${deepspeed[@]}" --no_local_rank --module sharded_lamb preflight "${more[@]}" || die "the preflight failed; what it says is above"
fi
# This package's commands read LOCAL_RANK and accept no --local_rank.
[[ -z ${module[*]} || $1 != sharded_lamb* ]] || module=(--no_local_rank --module)
run "${deepspeed[@]}" "${module[@]}" "$@"
