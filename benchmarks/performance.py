"""Make the tables of docs/performance.md from benchmarks/results/overhead.json.

python benchmarks/performance.py
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def in_training(models: dict[str, Any]) -> str:
    head = "| model | plain step, ms | measured over plain | with checks over plain | every 20th step |"
    lines = [head, "|---|---|---|---|---|"]
    for name, found in models.items():
        t = found["training"]
        numbers = (t["plain"]["milliseconds"], t["measured_over_plain"], t["checked_over_plain"])
        share = f"{t['overhead_at_default_cadence']:.1%}"
        lines.append(f"| {name} | {numbers[0]:.1f} | {numbers[1]:.2f} | {numbers[2]:.1f} | {share} |")
    return "\n".join(lines)


def engines(models: dict[str, Any]) -> str:
    names = list(dict.fromkeys(name for found in models.values() for name in found["engines"]))
    lines = ["| forward, backward and norms, over a plain step | " + " | ".join(models) + " |"]
    lines.append("|---" * (1 + len(models)) + "|")
    for name in names:
        cells = [found["engines"].get(name, {}).get("over_plain") for found in models.values()]
        lines.append(f"| {name} | " + " | ".join("-" if cell is None else f"{cell:.2f}" for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "overhead.json").read_text())
    page = ROOT / "docs" / "performance.md"
    before, rest = page.read_text().split(BEGIN)
    after = rest.split(END)[1]
    tables = "\n\n".join((in_training(results["models"]), engines(results["models"])))
    page.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}")


if __name__ == "__main__":
    main()
