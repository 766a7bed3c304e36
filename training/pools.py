"""Pools of texts that directions are described with: any .txt with one text a line."""

from __future__ import annotations

from pathlib import Path

from registry.errors import BadRequest, NotFound

MAX_TEXTS, MAX_LETTERS = 200_000, 2_000


def read_pool(file: str | Path) -> tuple[str, ...]:
    """The lines of a .txt, stripped, empty and doubled ones left out. Raises NotFound or BadRequest."""
    path = Path(file).expanduser()
    if path.suffix != ".txt" or not path.is_file():
        raise NotFound(f"There is no pool of texts {path}. Give a .txt with one text a line.")
    try:
        lines = tuple(dict.fromkeys(x for line in path.read_text("utf-8").splitlines() if (x := line.strip())))
    except UnicodeDecodeError as e:
        raise BadRequest(f"{path.name} is not UTF-8 ({e.reason} at byte {e.start}).") from None
    if not 2 <= len(lines) <= MAX_TEXTS:
        raise BadRequest(f"{path.name} has {len(lines)} different texts; a pool has 2 to {MAX_TEXTS}.")
    if long := next((x for x in lines if len(x) > MAX_LETTERS), None):
        raise BadRequest(f"{path.name} has a text of {len(long)} letters ({long[:40]!r}); {MAX_LETTERS} are allowed.")
    return lines
