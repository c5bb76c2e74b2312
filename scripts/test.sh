#!/usr/bin/env bash
# Run the tests, on this machine, GPU or not, in two processes; arguments go to pytest (-n 0: in one).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup_env.sh
# Threads of one process wait for their siblings while the other process has their core.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# By file: tests of a file share what it takes long to make.
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
