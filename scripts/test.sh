#!/usr/bin/env bash
# Set-up and all tests:
#     bash scripts/test.sh [pytest arguments]
source "$(dirname "$0")/setup.sh" "[test,docs]"
# three files at a time, also on two cores: many tests wait for other processes more than they
# compute; in the order of tests/conftest.py, which knows the long ones
# a worker that dies ends the run: started anew, xdist may wait for ever for what it had left
exec python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 "$@"
