#!/bin/sh
# Downloads models: sh scripts/download.sh [NAME ...] [options of download.py]; without a name, Stable Diffusion 1.5
# The first run makes a Python environment in .venv and installs requirements.txt and requirements-hub.txt there.
set -eu

script=$(readlink -f "$0") # it may have been started through a symbolic link
root=$(dirname "$(dirname "$script")")
. "$root/scripts/support/setup.sh"

make_environment
install_from requirements.txt
install_from requirements-hub.txt
exec "$python" "$root/scripts/download.py" "$@"
