#!/usr/bin/env bash
# Make .venv in the repository root, or bring it up to date: this package, editable, with what its tests and scripts need in the
# versions of scripts/constraints.txt. Takes a second when nothing has changed. PYTHON names another interpreter than python3.
# With --tritons also the further versions of Triton that the tests compile for (scripts/tritons.txt, 1.6 GB).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    printf 'setup_env.sh: %s\n' "$*" >&2
    exit 1
}

python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "found no $python; install Python 3.10 to 3.13 or name one: PYTHON=/path/to/python3 $0"
version=$("$python" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])')
case $version in
    3.10.* | 3.11.* | 3.12.* | 3.13.*) ;;
    *) fail "$python is Python $version; 3.10 to 3.13 is needed: PYTHON=/path/to/python3 $0" ;;
esac

stamp=$({ echo "$version $PWD"; cat pyproject.toml scripts/constraints.txt; } | sha256sum)
if [ "$(cat .venv/stamp 2>/dev/null)" != "$stamp" ]; then
    echo "setup_env.sh: installing into .venv (Python $version) ..."
    "$python" -m venv --clear .venv ||
        fail "$python has no working venv module; on Debian and Ubuntu: apt-get install python3-venv"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c scripts/constraints.txt -e '.[test,plots]'
    echo "$stamp" >.venv/stamp
fi

if [ "${1:-}" = --tritons ] && [ "$(uname)" = Linux ]; then
    grep '^triton==' scripts/tritons.txt | while read -r requirement; do
        name=${requirement%%;*}
        folder=.venv/${name/==/-}
        if [ ! -d "$folder" ]; then
            echo "setup_env.sh: installing $name into $folder ..."
            rm -rf "$folder.part"
            .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder.part" "$requirement"
            # Where a marker excludes this Python there is nothing to move.
            [ ! -d "$folder.part" ] || mv "$folder.part" "$folder"
        fi
    done
fi
