#!/usr/bin/env bash
# Set-up and all tests:
#     bash scripts/test.sh [pytest arguments]
source "$(dirname "$0")/setup.sh" "[test]"
exec python -m pytest -q "$@"
