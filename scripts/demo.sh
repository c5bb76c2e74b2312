#!/usr/bin/env bash
# Train a small Llama in bf16 and in blockwise fp8 on this machine, GPU or not, and compare the loss curves.
# Needs Python 3.10 to 3.13 and nothing else; takes minutes. Options: scripts/demo.sh --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup_env.sh
exec .venv/bin/python scripts/demo.py "$@"
