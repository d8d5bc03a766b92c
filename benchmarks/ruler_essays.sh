#!/bin/sh
# The essays in which five tasks of RULER hide their needles, for `sdtp eval ruler --essays DIR`: 49 files, 645 KB.
# They are Paul Graham's. They come out of the repository of FastKV (MIT, a licence of its code), at one revision. The
# project owns no rights in them, ships none of them and defaults to none of them.
# Usage: benchmarks/ruler_essays.sh DIR     (writes DIR; fetches a few MB by git, for which CLONE names another place:
#        a clone of dongwonjo/FastKV on this machine, which is read and left as it is)
set -eu
[ $# -eq 1 ] || { echo "usage: $0 DIR" >&2; exit 2; }
revision=b9787691535717c9ef39156b0fee8542c822df65
sum=9b3c8491a74697c7370bae0537ce0eeadd9ae49a5bf64bd17bfe14fe3e67f9fc
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
clone=${CLONE:-$work/clone}
# Without blobs: those of the essays come when they are read, and the prompts next to them, 300 MB, do not.
[ -n "${CLONE:-}" ] || git clone -q --bare --filter=blob:none https://github.com/dongwonjo/FastKV "$clone"
mkdir "$work/essays"
git -C "$clone" archive -o "$work/essays.tar" "$revision:data/PaulGrahamEssays"
tar -xf "$work/essays.tar" -C "$work/essays"
got=$(cd "$work/essays" && LC_ALL=C && export LC_ALL && sha256sum -- *.txt | sha256sum | cut -d ' ' -f 1)
[ "$got" = "$sum" ] || {
    echo "The essays are others than those that figures were made with: got the SHA-256 sum $got, expected $sum" >&2
    exit 1
}
mkdir -p "$1"
cp "$work"/essays/*.txt "$1"
