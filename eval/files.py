"""Files appear whole or not at all: written aside, then renamed."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_aside(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a path beside `path` to write to; renames it to `path` when the block ends well.

    The block makes a file or a folder there. If it raises, what it left is removed and whatever stood
    at `path` is untouched. A folder takes its place only where nothing, or an empty folder, stands.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as tmp:
    ...     with written_aside(Path(tmp) / "a.txt") as aside:
    ...         _ = aside.write_text("whole")
    ...     [(p.name, p.read_text()) for p in Path(tmp).iterdir()]
    [('a.txt', 'whole')]
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays, since some writers choose the format by it.
    aside = path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}{path.suffix}")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        if aside.is_dir():
            shutil.rmtree(aside)
        elif aside.exists():
            aside.unlink()
