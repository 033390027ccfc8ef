# shellcheck shell=bash
# Sourced by the launch scripts before everything else: -h or --help as the first argument prints the script's header.

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n -e '1d; /^#SBATCH/d; /^#/!q; s/^# \{0,1\}//p' -- "${BASH_SOURCE[-1]}"
    exit
fi
