#!/bin/sh
# Runs ruff, import-linter and the tests: sh scripts/test.sh [--slow] [paths and options of pytest]
# Stops at the first that fails, with its exit status.
set -eu

script=$(readlink -f "$0") # it may have been started through a symbolic link
root=$(dirname "$(dirname "$script")")
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
