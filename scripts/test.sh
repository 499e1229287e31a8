#!/bin/sh
# Runs ruff, import-linter and the tests: sh scripts/test.sh [--slow] [paths and options of pytest]
# Stops at the first that fails, with its exit status.
set -eu

script=$0
while [ -L "$script" ]; do # started through a symbolic link
    target=$(readlink "$script")
    case $target in
        /*) script=$target ;;
        *) script=$(dirname "$script")/$target ;;
    esac
done
root=$(CDPATH= cd -P "$(dirname "$script")/.." && pwd)
. "$root/scripts/support/setup.sh"

make_environment
install_from requirements.txt
install_from requirements-dev.txt
install_from requirements-playground.txt
install_from requirements-reference.txt --no-deps

cd "$root"
# Keeps the reference libraries off the network.
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
"$python" -m ruff check
"$python" -m ruff format --check
"${python%/*}/lint-imports" --no-cache --no-logo
# Two processes with one thread each. The tests of a file run in one process and share fixtures. In alphabetical order,
# not by number of tests: the files with the longest tests have few. For a debugger: -n 0
exec "$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
