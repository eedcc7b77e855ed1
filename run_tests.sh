#!/usr/bin/env bash
# Installs what the tests need, then runs the linter, the type checker and the tests:
#     bash run_tests.sh [--all] [PYTEST ARGUMENTS]
# Without --all the slow tests are left out. PYTHON=... chooses the interpreter that .venv is made with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. scripts/venv.sh

selection=(-m "not slow")
if [ "${1:-}" = --all ]; then
    selection=()
    shift
elif [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
    sed -n '2,4s/^# \{0,1\}//p' run_tests.sh
    exit
fi

# The page is tested in a real browser: a Chromium, its driver, and a font with Chinese characters. Compiled decoding
# needs a C++ compiler.
packages_to_install() {
    command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || echo chromium
    command -v chromedriver >/dev/null || echo chromium-driver
    command -v g++ >/dev/null || command -v clang++ >/dev/null || echo g++
    if ! command -v fc-list >/dev/null || [ -z "$(fc-list :lang=zh family)" ]; then
        echo fontconfig fonts-noto-cjk
    fi
}

install_packages() {
    local packages root=()
    packages=$(packages_to_install | tr '\n' ' ')
    [ -n "${packages// /}" ] || return 0
    if ! command -v apt-get >/dev/null; then
        echo "note: some tests need $packages: no apt-get here, install them by hand (the tests are skipped without)"
        return 0
    fi
    if [ "$(id -u)" != 0 ]; then
        if ! sudo -n true 2>/dev/null; then
            echo "note: some tests need $packages: sudo apt-get install $packages (the tests are skipped without)"
            return 0
        fi
        root=(sudo)
    fi
    echo "installing $packages"
    # shellcheck disable=SC2086  # a list of names
    if ! { ${root[@]+"${root[@]}"} apt-get update -qq && ${root[@]+"${root[@]}"} env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages >/dev/null; }; then
        echo "note: could not install $packages: the tests that need them are skipped"
    fi
}

# Fast, and before everything else: a mistake that they find makes the tests a waste of time.
check_source() {
    "$python" -m ruff check --quiet . || die "ruff check: see above; $python -m ruff check --fix . repairs some of it"
    "$python" -m ruff format --quiet --check . || die "not formatted: $python -m ruff format . does it"
    "$python" -m mypy --no-error-summary || die "mypy: see above"
}

make_venv test
check_source
install_packages
export PYTHONUTF8=1
# A file of tests runs in one process, as many files at once as there are cores, up to four: each takes some memory. With
# several threads in each they would wait for one another.
workers=$("$python" -c 'import os; print(min(4, os.cpu_count() or 1))')
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
status=0
"$python" -m pytest -n "$workers" --dist loadfile ${selection[@]+"${selection[@]}"} "$@" || status=$?
if [ "$status" = 5 ]; then
    echo "error: no test ran" >&2
fi
exit "$status"
