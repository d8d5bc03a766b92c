"""Real long texts to prefill."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os


def language_reference() -> str:
    """The language reference inside Python: about 465 000 characters, a little different in each version of Python."""
    from pydoc_data.topics import topics

    return "\n\n".join(text.strip() for _, text in sorted(topics.items()))


def read_text(path: str | os.PathLike[str]) -> str:
    """A text file, UTF-8.

    Raises
    ------
    ValueError
        If there is no such file, or it is empty or not UTF-8.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    if not text.strip():
        raise ValueError(f"{path}: holds no text")
    return text
