"""What ptxas says about kernels.

ptxas_report.py compile FOLDER nvcc ARGS...   runs nvcc with -Xptxas -v, keeps its report in FOLDER, fails on spills
ptxas_report.py print FOLDER                  one line per kernel: registers on each architecture
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")


def readable(symbol: str) -> str:
    """`frame_kernel bfloat16 72 2` from its mangled name."""
    name = re.search(r"([a-z][a-z_]*(?:8)?_kernel)(I\w*)?", symbol)
    if name is None:
        return symbol
    kernel, arguments = name[1], name[2] or ""
    types = re.findall(r"bfloat16|float16|Li\d+E|Lb\dE|^If", arguments)
    words = {"If": "float32"}
    return " ".join([kernel, *(words.get(t, re.sub(r"^L[ib](\d+)E$", r"\1", t)) for t in types)])


def parse(text: str) -> list[dict[str, object]]:
    """One record per kernel and architecture."""
    records: list[dict[str, object]] = []
    for line in text.splitlines():
        if entry := ENTRY.search(line):
            records.append({"kernel": readable(entry[1]), "arch": entry[2]})
        elif records and (spill := SPILL.search(line)):
            records[-1] |= {"stack": int(spill[1]), "spills": int(spill[2]) + int(spill[3])}
        elif records and (used := USED.search(line)):
            records[-1]["registers"] = int(used[1])
    return records


def compile_and_check(folder: Path, command: list[str]) -> int:
    if "-c" not in command:  # linking
        return subprocess.run(command, check=False).returncode
    done = subprocess.run([*command, "-Xptxas", "-v"], check=False, capture_output=True, text=True)
    text = done.stdout + done.stderr
    noise = re.compile(r"ptxas info|bytes stack frame|^\s*$")
    print(*(line for line in text.splitlines() if not noise.search(line)), sep="\n", end="", file=sys.stderr)
    if done.returncode:
        return done.returncode
    if serialized := re.findall(r"wgmma\.mma_async instructions are serialized.*", text):
        print("ptxas_report:", *serialized, sep="\n  ", file=sys.stderr)
        return 1
    records = parse(text)
    folder.mkdir(parents=True, exist_ok=True)
    target = command[command.index("-o") + 1]
    (folder / (re.sub(r"\W+", "_", target) + ".json")).write_text(json.dumps(records))
    spilled = [record for record in records if record.get("spills")]
    for record in spilled:
        print(
            f"ptxas_report: {record['kernel']} spills {record['spills']} bytes of registers on {record['arch']}: "
            "make its tiles smaller",
            file=sys.stderr,
        )
    if spilled:
        Path(target).unlink(missing_ok=True)
    return 1 if spilled else 0


def print_table(folder: Path) -> int:
    records = [record for path in sorted(folder.glob("*.json")) for record in json.loads(path.read_text())]
    kernels = sorted({record["kernel"] for record in records})
    archs = sorted({record["arch"] for record in records}, key=lambda arch: (len(arch.rstrip("a")), arch))
    print(
        f"{'registers per thread':40}", *(f"{arch:>7}" for arch in archs), "  stack  spills (bytes, the most)"
    )
    for kernel in kernels:
        own = [record for record in records if record["kernel"] == kernel]
        registers = {record["arch"]: record.get("registers", 0) for record in own}
        stack, spills = (max(record.get(key, 0) for record in own) for key in ("stack", "spills"))
        print(f"{kernel:40}", *(f"{registers.get(arch, ''):>7}" for arch in archs), f"{stack:7}{spills:8}")
    return 0


def main(arguments: list[str]) -> int:
    if len(arguments) >= 3 and arguments[0] == "compile":
        return compile_and_check(Path(arguments[1]), arguments[2:])
    if len(arguments) == 2 and arguments[0] == "print":
        return print_table(Path(arguments[1]))
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
