#!/bin/sh
# One directory that proves and times the kernels on a machine with a GPU and without network: OUT/run.sh runs
# 'sdtp bench gpu-check' there, with its options. The machine has torch for its GPU, Triton, transformers and pip.
# Usage: benchmarks/gpu_bundle.sh OUT
#        PYTHON: an environment that builds the package (python3). TARGET_PYTHON: the machine's version (3.12).
set -eu
[ $# -eq 1 ] || { echo "usage: $0 OUT" >&2; exit 2; }
python=${PYTHON:-python3} target=${TARGET_PYTHON:-3.12}
[ ! -e "$1" ] || { echo "$1 exists: pass a new directory" >&2; exit 2; }
mkdir -p "$1/wheels"
# The libraries are built on torch's stable ABI and know no Python: one wheel for all of them.
"$python" -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir "$1/wheels" .
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$target" \
    --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --platform any --dest "$1/wheels" \
    psutil rich markdown-it-py mdurl pygments \
    matplotlib contourpy cycler fonttools kiwisolver packaging pillow pyparsing python-dateutil six
cat > "$1/run.sh" <<'RUN'
#!/bin/sh
# sh run.sh [OPTIONS OF 'sdtp bench gpu-check']: rows and a picture in rows/, beside this file. --dry-run says the plan.
set -eu
here=$(cd "$(dirname "$0")" && pwd) python=${PYTHON:-python3}
# Beside what the machine's Python has, not into it.
[ -d "$here/site" ] || "$python" -m pip install --quiet --no-index --no-deps --target "$here/site" "$here"/wheels/*.whl
export PYTHONPATH="$here/site${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m sdtp_kernels bench gpu-check --out "$here/rows" "$@"
RUN
megabytes=$(du -sm "$1" | cut -f 1)
[ "$megabytes" -lt 60 ] || { echo "$1 has $megabytes MB, expected less than 60" >&2; exit 1; }
echo "$1: $megabytes MB; copy it, then: sh run.sh"
