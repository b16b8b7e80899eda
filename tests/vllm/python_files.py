"""python python_files.py WHEELS FOLDER: the Python files of the one wheel there, without compiled ones."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

if __name__ == "__main__":
    (wheel,) = Path(sys.argv[1]).glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [
            name for name in archive.namelist() if name.endswith((".py", ".json")) or ".dist-info/" in name
        ]
        archive.extractall(sys.argv[2], names)
