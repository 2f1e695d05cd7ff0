"""The tables and pictures of pruning, from the committed evidence. Run `python -m benchmarks.tables`."""

from pathlib import Path

from benchmarks import rivals, solving

PAGE, README = Path("docs/pruning-evidence.md"), Path("README.md")


def main() -> None:
    """Write the tables into README.md and docs/pruning-evidence.md, and draw the pictures."""
    for (page, name), lines in written().items():
        before, _, after = parts(page, name)
        page.write_text("\n".join([before, *lines, after]), encoding="utf-8")
    solving.draw(solving.solved())
    rivals.draw(rivals.rivals())


def written() -> dict[tuple[Path, str], list[str]]:
    """Return the lines of each table, by its page and its mark."""
    return {
        (PAGE, "solving"): solving.tables(solving.solved()),
        (README, "solving"): solving.ladder(solving.solved()),
        (PAGE, "rivals"): rivals.tables(rivals.rivals()),
    }


def parts(page: Path, name: str) -> tuple[str, str, str]:
    """Return a page up to the mark `<!-- NAME -->`, between it and `<!-- end -->`, and from there on.

    Raises:
        ValueError: a mark is missing.
    """
    mark, end = f"<!-- {name} -->\n", "\n<!-- end -->"
    before, rest = page.read_text(encoding="utf-8").split(mark)
    between, after = rest.split(end, maxsplit=1)
    return before + mark.strip(), between, end.strip() + after


if __name__ == "__main__":
    main()
