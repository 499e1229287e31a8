# Functions for demo.sh, download.sh, notebooks.sh, playground.sh and test.sh, which source this file and set $root to
# the repository.
#   make_environment                   makes a Python environment in $root/.venv if needed, and sets $python
#   install_from FILE [PIP OPTION...]  installs a requirements file, unless it is installed and has not changed
# Messages go to standard error. Standard output is for the caller.

environment=$root/.venv
case $(uname -s) in
    MINGW* | MSYS* | CYGWIN*) python=$environment/Scripts/python.exe ;; # Git's shell on Windows
    *) python=$environment/bin/python ;;
esac

# pip installs with --no-compile: a module is compiled when it is first imported. This variable, which containers often
# set, would let every process compile it again.
unset PYTHONDONTWRITEBYTECODE

say() {
    printf '%s\n' "$*" >&2
}

fail() {
    say "$@"
    exit 1
}

# Prints the version of a Python, such as 3.11. Prints nothing if it does not run: a name on the PATH may be a stub.
version_of() {
    "$1" -I -S -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

# torch 2.13 has builds for these versions.
suits() {
    case $1 in
        3.1[0-4]) return 0 ;;
        *) return 1 ;;
    esac
}

find_python() {
    for name in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
        if suits "$(version_of "$name")"; then
            printf '%s\n' "$name"
            return
        fi
    done
    fail "No Python 3.10 to 3.14 found: install one (https://www.python.org/downloads/) and run this again."
}

make_environment() {
    version=$(version_of "$python")
    suits "$version" && return
    [ -z "$version" ] || fail "$environment holds Python $version, not 3.10 to 3.14: remove it and run this again."
    base=$(find_python)
    say "Making a Python environment in $environment"
    if command -v uv >/dev/null 2>&1; then
        uv venv --quiet --clear --python "$base" "$environment" || fail "uv could not make $environment (see above)."
    else
        version=$(version_of "$base")
        "$base" -c 'import ensurepip, venv' 2>/dev/null ||
            fail "Python $version lacks its venv module: install it (Debian, Ubuntu: apt install python$version-venv)" \
                "and run this again."
        "$base" -m venv --clear "$environment" || fail "Python could not make $environment (see above)."
    fi
    version=$(version_of "$python")
}

install_from() {
    file=$1
    shift
    stamp=$environment/.installed-$file
    # Includes the version, because an upgraded Python does not see the packages of the old one.
    wanted="Python $version, cksum $(cksum <"$root/$file")"
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && return
    rm -f "$stamp" # so that an interrupted installation does not count as finished
    say "Installing $file into $environment"
    run_installer -r "$root/$file" "$@" >&2 ||
        fail "$file could not be installed (see above). Fix that and run this again to continue."
    printf '%s\n' "$wanted" >"$stamp"
}

run_installer() {
    if command -v uv >/dev/null 2>&1; then
        # uv ignores pip's settings. This one names folders with more packages.
        if [ -n "${PIP_FIND_LINKS:-}" ] && [ -z "${UV_FIND_LINKS:-}" ]; then
            UV_FIND_LINKS=$(printf '%s' "$PIP_FIND_LINKS" | tr ' ' ',')
            export UV_FIND_LINKS
        fi
        uv pip install --python "$python" "$@"
    else
        # pip is missing if uv made the environment, or if venv was interrupted.
        "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null || return
        # Without --no-compile, pip would compile thousands of modules that nothing imports.
        "$python" -m pip install --disable-pip-version-check --no-compile "$@"
    fi
}
