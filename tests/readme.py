"""The tables that the README shows and the program makes: between two comments, found by name."""

from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def _split(name: str) -> tuple[str, str, str]:
    begin, end = f"<!-- begin: {name} -->\n", f"<!-- end: {name} -->\n"
    before, found, rest = README.read_text().partition(begin)
    inside, closed, after = rest.partition(end)
    assert found and closed, f"README.md lacks {begin!r} or {end!r}"
    return before + begin, inside, end + after


def between(name: str) -> str:
    """The text between the comments of `name`."""
    return _split(name)[1]


def put(name: str, table: str) -> str:
    """The README with `table` between the comments of `name`."""
    before, _, after = _split(name)
    return before + table + after
