"""What every result says of itself: hardware, versions, commit, date."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # for a checkout that is not installed

import weightbus


def commit_of(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()  # noqa: S603 - git


def surroundings() -> dict[str, Any]:
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cpu = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "weightbus": weightbus.__version__,
    }
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return {
        "date": datetime.date.today().isoformat(),
        "commit": os.environ.get("WEIGHTBUS_COMMIT") or commit_of(Path(__file__).parent),
        "hardware": {"cpu": cpu, "cores": os.cpu_count(), "gpus": devices},
        "versions": versions,
    }


def write(path: str | None, name: str, rows: list[dict[str, Any]], **more: Any) -> None:
    if path:
        result = {"benchmark": name, **surroundings(), **more, "rows": rows}
        Path(path).write_text(json.dumps(result, indent=2) + "\n")
