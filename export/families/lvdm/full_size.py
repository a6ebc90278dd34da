"""Exports every released configuration at full size with random weights, one process each, and says what it took:
`python -m pyengine.export.families.lvdm.full_size --output DIR [--configurations sky sky_pred ...]`.

Shows that a machine of 24 GB is enough. Text to video comes with its KL-f8 decoder; CLIP needs its own files
(`pyengine export lvdm --clip`).
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from .export import clip_method, export_bundle, random_modules
from .released import CONFIGURATIONS, configuration


def export_one(name: str, folder: Path) -> dict[str, object]:
    """Exports one configuration in this process: seconds, peak memory, size."""
    start = time.perf_counter()
    modules = random_modules({"prediction": configuration(name)}).rounded()
    bundle = export_bundle(modules, folder, f"lvdm-{name}", clip_method(modules, 1.0))
    return {
        "configuration": name,
        "parameters": sum(p.numel() for part in modules.parts() for p in part.parameters()),
        "seconds": round(time.perf_counter() - start, 1),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        "bundle_gb": round(sum(path.stat().st_size for path in bundle.folder.iterdir()) / 1e9, 2),
        "segments": {
            key: sum(step.kind == "segment" for step in (component.cut or component.inline).steps)
            for key, component in bundle.components.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--configurations", nargs="+", default=list(CONFIGURATIONS), choices=list(CONFIGURATIONS)
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep the bundles instead of deleting each after it is measured"
    )
    parser.add_argument("--json", type=Path, help="collect the numbers in this file")
    parser.add_argument("--here", action="store_true", help="in this process: one configuration")
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(export_one(arguments.configurations[0], arguments.output)))
        return
    for name in arguments.configurations:
        folder = arguments.output / name
        command = [
            sys.executable,
            "-m",
            __spec__.name,
            "--here",
            "--output",
            str(folder),
            "--configurations",
            name,
        ]
        line = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        print(line, flush=True)
        if arguments.json is not None:
            known = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
            arguments.json.write_text(json.dumps(known | {name: json.loads(line)}, indent=1) + "\n")
        if not arguments.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
