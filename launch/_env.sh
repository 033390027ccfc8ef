# shellcheck shell=bash
# Sourced by the launch scripts. Checks the machine, creates .venv in the repository root (once: a hash of all
# inputs lets later runs reuse it without calling pip) and puts it first on PATH. A script that sets PINS before
# (`torch==2.14.1 deepspeed==0.18.9`) gets these versions, in an environment of its own: .venv-torch-2.14.1-deepspeed-0.18.9.

REPO_ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}
[[ -v PINS ]] || PINS=()
VENV=$REPO_ROOT/.venv$(printf -- '-%s' "${PINS[@]/==/-}")
readonly PINS VENV=${VENV%-}
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

# Prints constraints.txt with the distributions named here as installed, and without the pins that they exclude.
compatible_constraints() {
    "$VENV/bin/python" - "$CONSTRAINTS" "$@" <<'PY'
import sys
from importlib.metadata import requires, version
from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name

constraints, *chosen = sys.argv[1:]
needs = [Requirement(line) for name in chosen for line in requires(name) or ()]
needs = [need for need in needs if not need.marker or need.marker.evaluate({"extra": ""})]
print(*(f"{name}=={version(name)}" for name in chosen), sep="\n")
for line in open(constraints):
    name, _, pin = line.strip().partition("==")
    fits = all(need.specifier.contains(pin) for need in needs if canonicalize_name(need.name) == name)
    if pin and name not in chosen and fits:
        print(f"{name}=={pin}")
PY
}

# The commands are chained: `set -e` has no effect inside a function whose status is tested.
install_env() {
    local extras=$1 pip=("$VENV/bin/python" -m pip --disable-pip-version-check --quiet) constraints=$CONSTRAINTS pin said
    printf '%s: installing into %s (minutes, the first time)\n' "${0##*/}" "$VENV" >&2
    "$PYTHON" -m venv --clear "$VENV" || return
    for pin in "${PINS[@]}"; do
        said=$("${pip[@]}" install --no-deps "$pin" 2>&1) && continue
        rm -rf -- "$VENV"
        die "pip cannot install $pin: $(grep -im1 error: <<<"$said" || printf %s "$said")"
    done
    if ((${#PINS[@]})); then
        constraints=$VENV/constraints.txt
        compatible_constraints "${PINS[@]%%==*}" >"$constraints" || return
    fi
    "${pip[@]}" install -c "$constraints" 'setuptools>=77' wheel &&
        "${pip[@]}" install -c "$constraints" --no-build-isolation -e "${REPO_ROOT}[$extras]" &&
        # For the tests. Other dependencies of theirs are not needed and would replace torch (torchvision) and datasets.
        "${pip[@]}" install -c "$constraints" --no-deps timm torchtitan tyro spmd-types docstring-parser \
            open_clip_torch ftfy wcwidth webdataset braceexpand
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
