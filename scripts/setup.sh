# Sourced by the other scripts: makes or reuses .venv with this package and everything it needs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras="${1:-}"
stamp=".venv/.installed$(cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)$extras"
if [ ! -e "$stamp" ]; then
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
    echo "installing into .venv ..."
    # torch first: what comes later must not bring another build of it
    .venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
    .venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".$extras"
    touch "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
