# Sourced by run_demo.sh and run_tests.sh, after they changed to the root of the project.
# make_venv WHAT creates .venv when there is none, installs `demo` (what every stage needs) or `test` (and the test tools),
# and sets $python.

die() {
    echo "error: $*" >&2
    exit 2
}

# The first Python of at least 3.11 among $PYTHON, or else the usual names.
find_python() {
    local candidate candidates=(python3 python python3.14 python3.13 python3.12 python3.11)
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    if [ -n "${PYTHON:-}" ]; then
        die "PYTHON=$PYTHON is not a Python of version 3.11 or later: $("$PYTHON" --version 2>&1 || true)"
    fi
    die "Python 3.11 or later is needed and was not found: install it, or name it, as in PYTHON=/path/to/python3 bash $0"
}

venv_python() {
    local candidate
    for candidate in .venv/bin/python .venv/Scripts/python.exe; do
        if "$candidate" -c '' 2>/dev/null; then # fails after .venv was moved or its Python was removed
            echo "$PWD/$candidate"
            return
        fi
    done
    return 1
}

make_venv() {
    local base stamp wanted what
    if [ "$1" = test ]; then
        what=(-e ".[test]")
    else
        what=(-r requirements.txt)
    fi
    if ! python=$(venv_python); then
        base=$(find_python)
        echo "making .venv with $("$base" --version 2>&1)"
        if ! "$base" -c 'import venv, ensurepip' 2>/dev/null; then
            die "this Python has no venv module: on Debian or Ubuntu install it by 'apt install python3-venv'"
        fi
        rm -rf .venv
        "$base" -m venv .venv || die "could not make .venv: see above"
        python=$(venv_python) || die "the new .venv does not start: remove it and try again"
    fi
    stamp=.venv/installed-$1
    wanted=$(cat requirements.txt pyproject.toml)
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    echo "installing ${what[1]} into .venv (the first time this fetches PyTorch: several GB where it is the CUDA build)"
    "$python" -m pip install --disable-pip-version-check "${what[@]}" ||
        die "the installation failed: see above; after a network failure just run the same command again"
    printf '%s\n' "$wanted" >"$stamp"
}
