# shellcheck shell=bash
# Sourced by the launch scripts. Checks the machine, creates .venv in the repository root (once: a hash of all
# inputs lets later runs reuse it without calling pip) and puts it first on PATH.

REPO_ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}
readonly VENV=$REPO_ROOT/.venv
# With .venv active, use the Python that created it: another stamp would recreate .venv while it is in use.
if [[ $(command -v -- "$PYTHON") == "$VENV"/* ]]; then
    PYTHON=$("$PYTHON" -c 'import sys; print(sys._base_executable)') || PYTHON=python3
fi
readonly REPO_ROOT PYTHON
readonly CONSTRAINTS=$REPO_ROOT/configs/constraints.txt

die() {
    printf '%s: error: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

check_python() {
    command -v -- "$PYTHON" >/dev/null ||
        die "no $PYTHON on PATH; install Python 3.11 or newer, or name one with PYTHON=/path/to/python"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "$PYTHON is $("$PYTHON" -c 'import sys; print("Python %d.%d" % tuple(sys.version_info[:2]))');" \
            "Python 3.11 or newer is needed; name one with PYTHON=/path/to/python"
}

check_venv_module() {
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
        die "$PYTHON has no venv module; install it (Debian and Ubuntu: apt-get install python3-venv)"
}

check_c_compiler() {
    local name names=(cc gcc clang)
    [[ -z ${CC:-} ]] || names=("${CC%% *}")
    for name in "${names[@]}"; do
        command -v -- "$name" >/dev/null && return
    done
    die "no C compiler (${names[*]}) on PATH;" \
        "install one (Debian and Ubuntu: apt-get install build-essential) or name one with CC=/path/to/cc"
}

# Hash of all inputs of the environment; tool settings in pyproject.toml are not among them.
env_stamp() {
    "$PYTHON" - "$1" "$REPO_ROOT" <<'PY'
import hashlib, pathlib, sys, tomllib

extras, root = sys.argv[1], pathlib.Path(sys.argv[2])
config = tomllib.loads((root / "pyproject.toml").read_text())
parts = [extras, root, sys.base_prefix, sys.version, config["build-system"], config["project"]]
parts += [config["tool"]["setuptools"]]
parts += [(root / path).read_text() for path in ("configs/constraints.txt", "launch/_env.sh")]
print(hashlib.sha256(repr(parts).encode()).hexdigest())
PY
}

# The commands are chained: `set -e` has no effect inside a function whose status is tested.
install_env() {
    local extras=$1 pip=("$VENV/bin/python" -m pip --disable-pip-version-check --quiet)
    printf '%s: installing into %s (minutes, the first time)\n' "${0##*/}" "$VENV" >&2
    "$PYTHON" -m venv --clear "$VENV" &&
        "${pip[@]}" install -c "$CONSTRAINTS" setuptools wheel &&
        "${pip[@]}" install -c "$CONSTRAINTS" --no-build-isolation -e "${REPO_ROOT}[$extras]" &&
        # The tests compare with timm. Its dependency torchvision is not needed and would replace torch.
        "${pip[@]}" install -c "$CONSTRAINTS" --no-deps timm
}

# prepare_env [--use-current-env]: afterwards `python` is the environment's.
prepare_env() {
    if [[ ${1:-} == --use-current-env ]]; then
        python -c 'import sharded_lamb' 2>/dev/null ||
            die "--use-current-env: this environment's python cannot import sharded_lamb; pip install -e '${REPO_ROOT}[bert]' first"
        return
    fi
    check_python
    check_venv_module
    check_c_compiler
    local extras=bert,deepspeed,dev stamp
    stamp=$(env_stamp "$extras")
    if [[ $(cat -- "$VENV/.stamp" 2>/dev/null) != "$stamp" || ! -x $VENV/bin/python ]]; then
        rm -f -- "$VENV/.stamp"
        install_env "$extras" || die "the environment could not be made; the message above says why"
        printf '%s\n' "$stamp" >"$VENV/.stamp"
    fi
    export VIRTUAL_ENV=$VENV PATH="$VENV/bin:$PATH"
}
