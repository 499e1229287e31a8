#!/bin/sh
# Makes an image: sh scripts/demo.sh ["a prompt"] [options of demo.py]
# The first run makes a Python environment in .venv and installs requirements.txt there.
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
exec "$python" "$root/scripts/demo.py" "$@"
