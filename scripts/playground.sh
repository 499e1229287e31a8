#!/bin/sh
# Opens the playground in a browser: sh scripts/playground.sh [options of playground.py]
# The first run makes a Python environment in .venv, if there is none, and installs a web server into it.
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
install_from requirements-playground.txt
exec "$python" "$root/scripts/playground.py" "$@"
