#!/bin/sh
# Checks everything: sh scripts/test.sh [--slow] [options of pytest]
# The linter, then the tests; stops at the first that fails, with its exit status.
set -eu

script=$0
while [ -L "$script" ]; do # started through a symbolic link
    target=$(readlink "$script")
    case $target in
        /*) script=$target ;;
        *) script=$(dirname "$script")/$target ;;
    esac
done
root=$(cd -P "$(dirname "$script")/.." && pwd)
. "$root/scripts/support/setup.sh"

make_environment
install_from requirements.txt
install_from requirements-dev.txt
install_from requirements-reference.txt --no-deps

cd "$root"
# The reference libraries must not look for newer files on the network.
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
"$python" -m ruff check
"$python" -m ruff format --check
"${python%/*}/lint-imports" --no-cache --no-logo
# Two at a time, each on one thread; each file's tests stay together and share what they set up. "-n 0" for a debugger.
exec "$python" -m pytest -n 2 --dist loadfile "$@"
