"""``sdtp bench report``: every table and picture of the report, and the README's tables, from rows alone.

The rows are the JSON Lines below ``benchmarks/results``; :mod:`~sdtp_bench.report.results` reads
them, and :mod:`~sdtp_bench.report.tables` and :mod:`~sdtp_bench.report.figures` show them. No number is written by
hand. Where there are no rows, the page says which command makes them.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from sdtp_bench.report.figures import Picture
    from sdtp_bench.report.results import Results
    from sdtp_bench.report.tables import Table

PAGE = "index.html"
MARKED = re.compile(r"(<!-- table: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
OPENING = "<!-- table: "


def add_parser(commands: Any) -> None:
    """Add ``report`` to the parsers of ``sdtp bench``."""
    parser = commands.add_parser("report", help="the report and the README's tables, made from the rows of results")
    parser.add_argument("--results", default="benchmarks/results", metavar="DIR", help="rows (%(default)s)")
    parser.add_argument("--out", default="docs/report", metavar="DIR", help="page and pictures (%(default)s)")
    parser.add_argument("--documents", nargs="*", default=["README.md"], metavar="FILE",
                        help="Markdown whose tables between markers are renewed (README.md)")  # fmt: skip
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where anything is stale")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Build or check; see :func:`add_parser`."""
    from sdtp_kernels.cli import CommandError

    documents = [Path(name) for name in args.documents]
    try:
        if args.check:
            stale = check(Path(args.results), Path(args.out), documents)
            for name in stale:
                print(f"{name} is not what its rows say: 'sdtp bench report' (or 'make report') renews it")
            return 1 if stale else 0
        build(Path(args.results), Path(args.out), documents)
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from error
    except ImportError as error:
        raise CommandError(f"{error}: pip install 'sdtp-kernels[bench,eval]'") from error
    print(f"{Path(args.out) / PAGE}: open it in a browser")
    return 0


class Section(NamedTuple):
    """A part of the page."""

    name: str
    title: str
    text: str
    kinds: tuple[str, ...]
    """Of the rows that it is made of."""
    tables: list[Table]
    pictures: list[Picture]
    missing: dict[str, str]
    """Commands by the kind of rows that are not there."""


def sections(rows: Results) -> list[Section]:
    """All parts in their order, with what the rows give."""
    from sdtp_bench.report import figures, tables
    from sdtp_bench.report.results import COMMANDS

    models = tables.stage_models()

    def section(
        name: str, title: str, text: str, kinds: tuple[str, ...], found: list[Table], drawn: list[Picture]
    ) -> Section:
        missing = {kind: COMMANDS[kind] for kind in kinds if not rows[kind] or not (found or drawn)}
        return Section(name, title, text, kinds, found, drawn, missing)

    return [
        section(
            "prefill", "Prefill, dense and pruned",
            "Both sides take turns in one run, and are timed only after the pruned model was shown to compute what it "
            "must. The ideal is dense FLOPs over pruned FLOPs of exactly this prompt and schedule.",
            ("prefill",), tables.prefill(rows), figures.speed(rows),
        ),
        section(
            "decode", "Prefill and new tokens",
            "The same count of new tokens on both sides, whatever they are.",
            ("decode",), tables.decode(rows), [],
        ),
        section(
            "where", "Where the time goes",
            "A profile of the same prefills: matrix products outside attention, attention, pruning, all else.",
            ("prefill",), tables.where(rows), figures.where(rows),
        ),
        section(
            "kept", "Kept tokens layer by layer",
            "What a schedule leaves to each layer, which is also the length of the layer's cache.",
            ("prefill",), [], figures.kept(rows),
        ),
        section(
            "memory", "Memory",
            "Bytes of the KV cache as the cache object has them, the peak above the weights where it was measured, and "
            "the longest prompt whose peak stays below a limit.",
            ("prefill", "memory"), tables.memory(rows), figures.memory(rows),
        ),
        section(
            "multi", "Several processes",
            "Tensor parallelism has to beat the best single process, which has the whole machine.",
            ("multi",), tables.multi(rows), [],
        ),
        section(
            "quality", "What pruning costs",
            "Loss and answers of a pruned model against the dense one on the same samples, at equal B: learned "
            "pruners, training-free scorers, and presses that cut the cache after a dense prefill.",
            ("quality", "cost", "evict"), [*tables.quality(rows), *tables.scoring(rows), *tables.evict(rows)],
            [*figures.modes(rows), *figures.pareto(rows)],
        ),
        section(
            "peers", "Peers",
            "The same prompt, checkpoint and mean kept tokens, in one run. Who cannot run is listed with the reason.",
            ("peers",), tables.peers(rows), figures.peers(rows),
        ),
        section(
            "op", "The op against its baselines",
            "One pruning stage: score, select, gather. Outputs are compared before anything is timed.",
            ("op", "scaling"), [*tables.op(rows), *tables.scaling(rows)], [*figures.op(rows), *figures.scaling(rows)],
        ),
        section(
            "gpu", "GPUs: models and compilers",
            "Nothing here was measured on a GPU. The roofline is computed from shapes and the vendors' peaks; "
            "registers and spills are what the compilers report. On a machine with a GPU, make gpu-check measures.",
            ("triton", "nvcc"), [tables.gpu_model(models), *tables.compiled(rows)], [figures.roofline(models)],
        ),
    ]  # fmt: skip


def render(rows: Results, parts: list[Section], digest: str) -> str:
    """The page as HTML."""
    import jinja2

    from sdtp_bench.report.results import UNKNOWN, Source

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    shown = [row for kind, members in rows.items() if kind != UNKNOWN for row in members]
    return environment.get_template("page.html").render(
        sections=parts, source=Source.of(shown), unknown=Source.of(rows[UNKNOWN]).files, digest=digest
    )


def markdown(found: list[Table]) -> str:
    """Tables and the line under each, as Markdown: the page has commands and rows."""
    from sdtp_bench.report import tables

    blocks = []
    for table in found:
        marks = ["---:" if is_numeric else "---" for is_numeric in table.numeric]
        lines = ["| " + " | ".join(cells) + " |" for cells in (table.columns, marks, *table.rows)]
        source = f"{table.title}; {table.source.facts()}. [How it was measured](docs/report/index.html#quality)."
        source = textwrap.fill(source, 120, break_long_words=False, break_on_hyphens=False)
        blocks.append("\n".join([*lines, "", source]).replace(tables.SPACE, " "))
    return "\n\n".join(blocks)


def renewed(text: str, rows: Results, name: str) -> str:
    """A document with its tables made again between ``<!-- table: NAME -->`` and ``<!-- end -->``.

    Raises
    ------
    ValueError
        For a table that is not known, has no rows, or is not closed; `name` is the document's, for the message.
    """
    from sdtp_bench.report import tables

    known: dict[str, Callable[[Results], list[Table]]] = {"modes": tables.modes}

    def renew(match: re.Match[str]) -> str:
        opening, wanted, _, closing = match.groups()
        if wanted not in known:
            raise ValueError(f"{name}: no table {wanted!r}; known: {', '.join(known)}")
        found = known[wanted](rows)
        if not found:
            raise ValueError(
                f"{name}: there are no rows for the table {wanted!r}; measure first or take its marker out"
            )
        return f"{opening}\n{markdown(found)}\n\n{closing}"

    if text.count(OPENING) != len(MARKED.findall(text)):
        raise ValueError(f"{name}: a line '{OPENING}NAME -->' has no '<!-- end -->' before the next one")
    return MARKED.sub(renew, text)


class _Built(NamedTuple):
    texts: dict[Path, str]
    """Content of the page and the documents, by path."""
    pictures: list[Picture]


def _make(results: Path, out: Path, documents: list[Path]) -> _Built:
    from sdtp_bench.report.results import read

    if not results.is_dir():
        raise ValueError(f"--results {results}: no such directory; run this in the repository, or name it")
    rows = read(results)
    texts = {path: renewed(path.read_text(encoding="utf-8"), rows, str(path)) for path in documents}
    parts = sections(rows)
    digest = hashlib.sha256()
    for file in sorted(results.rglob("*.jsonl")):
        digest.update(f"{file.relative_to(results).as_posix()}\n".encode() + file.read_bytes())
    texts[out / PAGE] = render(rows, parts, digest.hexdigest()[:16])
    return _Built(texts, [picture for part in parts for picture in part.pictures])


def build(results: Path, out: Path, documents: list[Path]) -> None:
    """Write the page with its pictures, and renew the documents; everything is made before anything is replaced.

    Parameters
    ----------
    results : Path
        Directory with rows.
    out : Path
        Directory of the page; pictures in it that belong to no page any more are removed.
    documents : list of Path
        Markdown files with markers.

    Raises
    ------
    ValueError
        For rows and documents that cannot be read.
    ImportError
        If matplotlib, jinja2 or Triton is not installed.
    """
    built = _make(results, out, documents)
    with tempfile.TemporaryDirectory() as folder:
        for picture in built.pictures:
            picture.save(Path(folder))
        out.mkdir(parents=True, exist_ok=True)
        for old in out.glob("*.svg"):
            old.unlink()
        for new in Path(folder).iterdir():
            shutil.copyfile(new, out / new.name)
    for path, text in built.texts.items():
        path.write_text(text, encoding="utf-8")


def check(results: Path, out: Path, documents: list[Path]) -> list[str]:
    """Names of the files that :func:`build` would change; a picture counts by its presence, the page by every letter.

    The page names a digest of all rows, so pictures of other rows are found stale with it.
    """
    built = _make(results, out, documents)
    stale = [
        str(path) for path, text in built.texts.items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]  # fmt: skip
    wanted, found = {f"{picture.name}.svg" for picture in built.pictures}, {file.name for file in out.glob("*.svg")}
    return [*stale, *(str(out / name) for name in sorted(wanted ^ found))]
