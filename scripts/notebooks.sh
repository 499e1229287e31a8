#!/bin/sh
# Opens the notebooks in a browser: sh scripts/notebooks.sh [options of jupyter lab]
# The first run makes a Python environment in .venv, if there is none, and installs Jupyter and matplotlib into it.
set -eu

script=$(readlink -f "$0") # it may have been started through a symbolic link
root=$(dirname "$(dirname "$script")")
. "$root/scripts/support/setup.sh"

make_environment
install_from requirements.txt
install_from requirements-notebooks.txt
# The links in the notebooks lead to files of the whole repository.
exec "$python" -m jupyterlab --ServerApp.root_dir="$root" --LabApp.default_url=/lab/tree/scripts/notebooks "$@"
