# shellcheck shell=bash
# Sourced by the scripts that start ranks, after _env.sh. With `dry_run` set, commands are printed and not run.

# Sets `python`: the active environment's, else the repository's.
find_python() {
    python=${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/}python
    [[ -n ${VIRTUAL_ENV:-} || ! -x $VENV/bin/python ]] || python=$VENV/bin/python
    [[ -n ${dry_run:-} ]] && return
    # Finds the package without importing it: that would import torch once more in every task.
    "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("sharded_lamb") is None)' 2>/dev/null ||
        die "$python cannot import sharded_lamb; install it on every host: pip install -c '$CONSTRAINTS' -e '${REPO_ROOT}[bert]'"
}

count_devices() {
    if [[ -n ${dry_run:-} ]]; then
        command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus | wc -l || echo 1
    else
        "$python" -c 'import torch; print(torch.cuda.device_count() or 1)'
    fi
}

# use_interface NAME: use it for NCCL, gloo and torch's own connections.
use_interface() {
    [[ -n $1 ]] || return 0
    local interfaces='import socket; print(*(name for _, name in socket.if_nameindex()))'
    if [[ -z ${dry_run:-} ]]; then
        interfaces=$("$python" -c "$interfaces")
        [[ " $interfaces " == *" $1 "* ]] || die "there is no network interface '$1' here; there are: $interfaces"
    fi
    export NCCL_SOCKET_IFNAME=$1 GLOO_SOCKET_IFNAME=$1 TP_SOCKET_IFNAME=$1
    [[ -z ${dry_run:-} ]] || printf 'export NCCL_SOCKET_IFNAME=%q GLOO_SOCKET_IFNAME=%q TP_SOCKET_IFNAME=%q\n' "$1" "$1" "$1"
}

# execute COMMAND ...: run it, or print it quoted for a shell.
execute() {
    if [[ -n ${dry_run:-} ]]; then
        printf '%q ' "$@"
        printf '\n'
    else
        "$@"
    fi
}
