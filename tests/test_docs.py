"""What people read: links that lead somewhere, words of the field, lines that run as they stand there, the site."""

import ast
import io
import os
import re
import runpy
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
from helpers.models import save_byte_model

import sdtp_kernels

ROOT = Path(__file__).resolve().parent.parent
PLACES = (".", "docs", "docs/notes", "benchmarks", "examples")
PAGES = sorted(path for place in PLACES for path in (ROOT / place).glob("*.md"))
SITE = Path(sys.prefix) / "docs"  # what the site is made with: see the Makefile
# Words that readers stumble over, each with what to say instead.
AVOIDED = {
    r"behind (the|a|its|their) (prompt|text|context|question|last|first)": "after",
    r"\banew\b": "again",
    r"\blikewise\b": "also",
    r"\bby turns\b": "interleaved",
    r"\bbeside them\b": "next to them",
    r"\bin place of\b": "instead of",
    r"\bbefalls\b": "say who pays for what",
    r"\bopinions?\b": "running mean score",
    r"\btokens wait\b": "deferred tokens",
    r"\bpieces? of a prompt\b": "chunk",
}
pytestmark = pytest.mark.skipif(not (ROOT / "README.md").is_file(), reason="a copy of the source without its documents")


def anchors(page):
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{target}: known are {sorted(anchors(file))}"
        if anchor and file.suffix == ".html":
            assert f'id="{anchor}"' in file.read_text(), target


def prose(path):
    """What of a file people read: all of a page, of a program its comments and strings."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return text
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return "\n".join(token.string for token in tokens if token.type in (tokenize.COMMENT, tokenize.STRING))


def test_words_that_readers_stumble_over_are_avoided():
    sources = [path for folder in ("sdtp_kernels", "python", "examples") for path in (ROOT / folder).rglob("*.py")]
    found = []
    for path in (*PAGES, *sources):
        if "notes" in path.parts:  # experiments stay as they were written down
            continue
        text = " ".join(prose(path).split())
        for word, instead in AVOIDED.items():
            found += [f"{path.relative_to(ROOT)}: {match[0]!r}, say {instead!r}" for match in re.finditer(word, text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("page", ["README.md", "docs/quick-start.md"])
def test_the_lines_of_the_first_pages_run(page, tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    save_byte_model(tmp_path / "my-model")
    Path("long.txt").write_text("A long text. " * 40)
    exec(compile(code, page, "exec"), {})
    assert "tokens" in capsys.readouterr().out


def test_the_navigation_contains_every_page():
    navigation = runpy.run_path(str(ROOT / "docs/conf.py"))["NAVIGATION"]
    listed = [page for pages in navigation.values() for page in pages]
    home = ROOT / "README.md"
    assert sorted(listed) == sorted(page.relative_to(ROOT).with_suffix("").as_posix() for page in {*PAGES} - {home})


def test_every_public_name_is_on_the_api_page():
    directives = re.findall(r"^\.\. auto\w+:: ([\w.]+)", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert sorted(set(sdtp_kernels.__all__) - set(directives)) == []


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    if not SITE.is_dir():
        pytest.skip(f"Sphinx is not in {SITE}: 'make docs' puts it there")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SITE), os.environ.get("PYTHONPATH", "")])}
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "-c",
        "docs",
        "-d",
        tmp_path / "doctrees",
        ".",
        tmp_path / "site",
    ]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    for page in ("index.html", "docs/api.html", "docs/report/index.html"):
        assert (tmp_path / "site" / page).is_file(), page


FOREIGN = ("No module named 'setuptools.command.bdist_wheel'", "unexpected memory mapping")
"""Texts of other tools that readers meet."""


def texts_of_the_source():
    """Strings as people see them: parts joined, what differs left out as ``...``."""
    for path in (ROOT / "setup.py", *(ROOT / "sdtp_kernels").rglob("*.py"), *(ROOT / "python").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
    for path in (ROOT / "csrc").rglob("*.cpp"):
        yield re.sub(r'"\s*\n\s*"', "", path.read_text())


def test_troubleshooting_has_the_texts_that_the_package_prints():
    rows = re.findall(r"^\| (.*?) \| .* \|$", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    told = [text for row in rows for text in re.findall(r"`([^`]+)`", row) if text not in FOREIGN]
    assert len(told) > 40
    known = set(texts_of_the_source())
    missing = [
        text
        for text in told
        if not any(all(part in source for part in text.split("...") if part.strip(" .,:")) for source in known)
    ]
    assert missing == []
