#!/bin/sh
# Downloads models: sh scripts/download.sh [NAME ...] [options of download.py]; without a name, Stable Diffusion 1.5
# The first run makes a Python environment in .venv and installs requirements.txt and requirements-hub.txt there.
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
install_from requirements-hub.txt
exec "$python" "$root/scripts/download.py" "$@"
