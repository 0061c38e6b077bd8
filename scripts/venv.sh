# Sourced by demo.sh and test.sh: goes to the repository root and makes .venv ready for use.
#
#   need EXTRAS    install this package with its extras, at the versions of constraints.txt
#
# PYTHON names the interpreter a new .venv is made with (default python3). A second run finds
# everything in place and installs nothing, until pyproject.toml or constraints.txt change.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

need() {
    local extras=$1 installed=".venv/installed-$1" wanted
    wanted=$(cat pyproject.toml constraints.txt | cksum)
    if [[ -x .venv/bin/python && -f $installed && $(<"$installed") == "$wanted" ]]; then
        return
    fi
    [[ -x .venv/bin/python ]] || "${PYTHON:-python3}" -m venv --clear .venv
    echo "installing cute-router[$extras] into .venv ..."
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        -c constraints.txt -e ".[$extras]"
    echo "$wanted" >"$installed"
}
