#!/bin/sh
# Makes an image: sh scripts/demo.sh ["a prompt"] [options of demo.py]
# The first run makes a Python environment in .venv and installs requirements.txt there.
set -eu

script=$(readlink -f "$0") # it may have been started through a symbolic link
root=$(dirname "$(dirname "$script")")
. "$root/scripts/support/setup.sh"

make_environment
install_from requirements.txt
exec "$python" "$root/scripts/demo.py" "$@"
