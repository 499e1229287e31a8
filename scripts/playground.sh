#!/bin/sh
# Opens the playground in a browser: sh scripts/playground.sh [options of playground.py]
# The first run makes a Python environment in .venv, if there is none, and installs a web server into it.
set -eu

script=$(readlink -f "$0") # it may have been started through a symbolic link
root=$(dirname "$(dirname "$script")")
. "$root/scripts/support/setup.sh"

make_environment
install_from requirements.txt
install_from requirements-playground.txt
exec "$python" "$root/scripts/playground.py" "$@"
