# Sourced by demo.sh, notebooks.sh and test.sh, with $root set to the repository. Keeps a Python environment in $root/.venv:
#   make_environment                   makes .venv if there is none that runs, and sets $python
#   install_from FILE [PIP OPTION...]  installs a requirement file, unless exactly that was installed before
# What they say goes to standard error: standard output belongs to the caller.

environment=$root/.venv
case $(uname -s) in
    MINGW* | MSYS* | CYGWIN*) python=$environment/Scripts/python.exe ;; # Git's shell on Windows
    *) python=$environment/bin/python ;;
esac

say() {
    printf '%s\n' "$*" >&2
}

fail() {
    say "$@"
    exit 1
}

# Prints 3.11 for Python 3.11, and nothing for what does not run: a name on the PATH may be a stub.
version_of() {
    "$1" -I -S -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

# torch 2.13 has builds for these.
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
    # With the version: an upgraded Python does not see the packages of the one before it.
    wanted="Python $version, cksum $(cksum <"$root/$file")"
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && return
    rm -f "$stamp" # an interrupted installation must not pass for a finished one
    say "Installing $file into $environment"
    run_installer -r "$root/$file" "$@" >&2 ||
        fail "$file could not be installed (see above): mend that and run this again, it goes on from here."
    printf '%s\n' "$wanted" >"$stamp"
}

run_installer() {
    if command -v uv >/dev/null 2>&1; then
        # uv reads none of pip's settings; this one says where packages that were built here lie.
        if [ -n "${PIP_FIND_LINKS:-}" ] && [ -z "${UV_FIND_LINKS:-}" ]; then
            UV_FIND_LINKS=$(printf '%s' "$PIP_FIND_LINKS" | tr ' ' ',')
            export UV_FIND_LINKS
        fi
        uv pip install --python "$python" "$@"
    else
        # uv makes environments without pip, and so does an interrupted venv.
        "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null || return
        "$python" -m pip install --disable-pip-version-check "$@"
    fi
}
