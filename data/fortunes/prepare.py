"""Write `fortunes.txt` from the quotations of Debian's packages fortunes and fortunes-min.

Run as `python data/fortunes/prepare.py [FOLDER]`. FOLDER has the installed files of the packages.
"""

import hashlib
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
INSTALLED = Path("/usr/share/games/fortunes")  # by the packages
LEFT_OUT = {"ascii-art"}  # drawings


def main() -> None:
    """Write the file, and print its size."""
    folder = Path(sys.argv[1]) if sys.argv[1:] else INSTALLED
    files = [p for p in sorted(folder.glob("*")) if not p.suffix and p.name not in LEFT_OUT]
    texts = [quotation for path in files for quotation in quotations(path)]
    if not texts:
        sys.exit(
            f"{HERE.name}: {folder} has no quotations: install them with apt-get install fortunes "
            "fortunes-min, or unpack these packages and give the folder of their files"
        )
    content = "\n\n".join(dict.fromkeys(texts)).encode() + b"\n"  # each once
    partial = HERE / "fortunes.txt.partial"
    partial.write_bytes(content)
    partial.replace(HERE / "fortunes.txt")
    print(
        f"{HERE.name}: fortunes.txt, {len({*texts}):,} quotations, {len(content):,} bytes, sha256 "
        f"{hashlib.sha256(content).hexdigest()[:12]}"
    )


def quotations(path: Path) -> list[str]:
    """Return the quotations of a file; lines that are only % stand between them."""
    parts = re.split(r"^%\s*$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [part.strip() for part in parts if part.strip()]


if __name__ == "__main__":
    main()
