#!/bin/sh
# Texts that took no part in training or in any choice: documentation out of Debian's packages, a directory a source.
# Usage: benchmarks/unseen_texts.sh OUT      (needs a Debian with its package sources; downloads about 80 MB, installs nothing)
set -eu
[ $# -eq 1 ] || { echo "usage: $0 OUT" >&2; exit 2; }
mkdir -p "$1" && cd "$1"
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT

# source, package, directory in it
while read -r source package directory; do
    (cd "$work" && apt-get download -q "$package" && dpkg -x "$package"_*.deb "$package")
    (cd "$work/$package/usr/share/$directory" && find . -type f \( -name '*.html' -o -name '*.pod' \) ! -type l) |
        while read -r file; do
            mkdir -p "$source/$(dirname "$file")"
            cp "$work/$package/usr/share/$directory/$file" "$source/$file"
        done
done <<'END'
aptitude aptitude-doc-en doc/aptitude/html/en
devref developers-reference developers-reference
django python-django-doc doc/python-django-doc/html
git git-doc doc/git-doc
handbook debian-handbook doc/debian-handbook/html/en-US
linux linux-doc-6.1 doc/linux-doc-6.1/html/admin-guide
perl perl-doc perl/5.36.0/pod
postgres postgresql-doc-15 doc/postgresql-doc-15/html
rustbook rust-doc doc/rust-doc/html/book
sqlite sqlite3-doc doc/sqlite3
END
