#!/bin/sh
# Real long texts out of Debian's documentation packages, a directory a source: to train with, to choose with, to judge with.
# No source is in two of the sets. Nothing was ever trained on or chosen by the judging set.
# Usage: benchmarks/debian_texts.sh training|choosing|judging OUT
#        (needs a Debian 12 with its package sources; the training set takes 700 MB of disk; installs nothing)
set -eu
usage() { echo "usage: $0 training|choosing|judging OUT" >&2; exit 2; }
[ $# -eq 2 ] || usage
plain='*.pod'
# source, package, directory below /usr/share
case $1 in
training) plain='*.txt' list='anarchism anarchism doc
boost libboost1.74-doc doc
erlang erlang-doc doc
faq debian-faq doc
ghc ghc-doc doc
install installation-guide-amd64 doc/installation-guide-amd64/en
nodejs nodejs-doc doc
octave octave-doc doc
racket racket-doc doc
rdoc r-doc-html R
vim vim-runtime vim/vim90/doc' ;;
choosing) list='apache apache2-doc doc/apache2-doc/manual/en
exim exim4-doc-html doc
policy debian-policy doc
sbcl sbcl-doc doc
zsh zsh-doc doc/zsh-common/html' ;;
judging) list='aptitude aptitude-doc-en doc/aptitude/html/en
devref developers-reference developers-reference
django python-django-doc doc/python-django-doc/html
git git-doc doc/git-doc
handbook debian-handbook doc/debian-handbook/html/en-US
linux linux-doc-6.1 doc/linux-doc-6.1/html/admin-guide
perl perl-doc perl/5.36.0/pod
postgres postgresql-doc-15 doc/postgresql-doc-15/html
rustbook rust-doc doc/rust-doc/html/book
sqlite sqlite3-doc doc/sqlite3' ;;
*) usage ;;
esac
mkdir -p "$2" && cd "$2"
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
echo "$list" | while read -r source package directory; do
    (cd "$work" && apt-get download -q "$package" && dpkg -x "$package"_*.deb "$package")
    (cd "$work/$package/usr/share/$directory" &&
        find . -type f \( -name '*.html' -o -name "$plain" \) ! -type l) |
        while read -r file; do
            mkdir -p "$source/$(dirname "$file")"
            cp "$work/$package/usr/share/$directory/$file" "$source/$file"
        done
done
