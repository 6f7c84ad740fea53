"""Tables of README.md and benchmarks/README.md, and plots, from the numbers in results/.

    python benchmarks/render.py            write the tables between their marks, and the plots
    python benchmarks/render.py --check    say which tables are stale; exit code 1 if any is

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; what is between is replaced,
so a number in a table can't differ from the measurement. ``tests/test_render.py`` checks that.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves it out

from tables import TABLES

HERE = Path(__file__).parent
DOCUMENTS = (HERE.parent / "README.md", HERE / "README.md")
MARK = re.compile(
    r"^(?P<indent> *)<!-- table: (?P<name>[\w-]+) -->\n(?P<old>.*?)^ *<!-- end -->",
    re.MULTILINE | re.DOTALL,
)


def rendered(text: str) -> str:
    """The document with every marked table made anew, as far indented as its mark.

    Raises:
        SystemExit: a mark names no table, or has no end.
    """
    if text.count("<!-- table:") != len(MARK.findall(text)):
        raise SystemExit("a <!-- table: NAME --> has no <!-- end --> on a line of its own")

    def replace(mark: re.Match[str]) -> str:
        name, indent = mark["name"], mark["indent"]
        if name not in TABLES:
            raise SystemExit(f"<!-- table: {name} -->: there are {', '.join(TABLES)}")
        lines = [f"<!-- table: {name} -->", *TABLES[name](), "<!-- end -->"]
        return "\n".join(f"{indent}{line}".rstrip() for line in lines)

    return MARK.sub(replace, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Write tables and plots, or say which tables are stale."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--tables", action="store_true", help="no plots, which need matplotlib")
    args = parser.parse_args(argv)
    stale = []
    for path in DOCUMENTS:
        old = path.read_text("utf-8")
        if (new := rendered(old)) != old:
            stale.append(path.name if path.parent != HERE else f"benchmarks/{path.name}")
            if not args.check:
                path.write_text(new, encoding="utf-8")
    if args.check:
        for name in stale:
            print(f"{name}: stale; python benchmarks/render.py writes it", file=sys.stderr)
        return int(bool(stale))
    if not args.tables:
        import plots

        plots.main(HERE / "plots")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
