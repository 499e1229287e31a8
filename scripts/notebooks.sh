#!/bin/sh
# Opens the notebooks in a browser: sh scripts/notebooks.sh [options of jupyter lab]
# The first run makes a Python environment in .venv, if there is none, and installs Jupyter and matplotlib into it.
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
install_from requirements-notebooks.txt
exec "$python" -m jupyterlab --notebook-dir "$root/scripts/notebooks" "$@"
