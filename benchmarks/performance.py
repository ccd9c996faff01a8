"""Make the tables of docs/performance.md from benchmarks/results/overhead.json and overhead_cuda.json.

python benchmarks/performance.py
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MARKS = "<!-- {}: begin -->", "<!-- {}: end -->"


def in_training(models: dict[str, Any]) -> str:
    every = next(iter(models.values()))["training"]["every_n_steps"]
    head = "| model | plain step, ms | measured over plain | with checks over plain | share of the time, "
    lines = [f"{head}every {every} steps | peak memory | with checks |", "|---" * 7 + "|"]
    for name, found in models.items():
        t = found["training"]
        numbers = (t["plain"]["milliseconds"], t["measured_over_plain"], t["checked_over_plain"])
        memory = [found.get("peak_MiB", {}).get(ratio) for ratio in ("ratio", "ratio_with_checks")]
        cells = [
            f"{numbers[0]:.1f}",
            f"{numbers[1]:.2f}",
            f"{numbers[2]:.1f}",
            f"{t['overhead_at_default_cadence']:.1%}",
        ]
        cells += ["-" if ratio is None else f"{ratio:.2f}" for ratio in memory]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def engines(models: dict[str, Any]) -> str:
    models = {name: found for name, found in models.items() if "engines" in found}
    names = list(dict.fromkeys(name for found in models.values() for name in found["engines"]))
    lines = ["| a step with both norms, over a plain step | " + " | ".join(models) + " |"]
    lines.append("|---" * (1 + len(models)) + "|")
    for name in names:
        cells = [found["engines"].get(name, {}).get("over_plain") for found in models.values()]
        lines.append(f"| {name} | " + " | ".join("-" if cell is None else f"{cell:.2f}" for cell in cells) + " |")
    return "\n".join(lines)


def overheads(models: dict[str, Any]) -> str:
    lines = ["| model | logged | seen from outside | bytes sent by a measurement |", "|---|---|---|---|"]
    for name, found in models.items():
        t = found["training"]
        logged, outside = t["overhead_logged"], t["overhead_seen_from_outside"]
        lines.append(f"| {name} | {logged:.2f} | {outside:.2f} | {t['bytes_sent_by_a_measurement']} |")
    return "\n".join(lines)


def growth(found: dict[str, dict[str, float]]) -> str:
    lines = ["| as this grows | measured over plain |", "|---|---|"]
    for what, ratios in found.items():
        lines.append(f"| {what} | " + ", ".join(f"{n}: {ratio:.2f}" for n, ratio in ratios.items()) + " |")
    return "\n".join(lines)


def by_precision(models: dict[str, Any]) -> dict[str, Any]:
    """Return each precision's training as a model of its own."""
    found = {}
    for name, measured in models.items():
        found[f"{name}, float32 on tensor cores"] = measured
        found[f"{name}, bf16-mixed"] = {"training": measured["training_bf16"]}
    return found


def between(page: str, what: str, tables: list[str]) -> str:
    """Put tables between the page's two marks."""
    begin, end = (mark.format(what) for mark in MARKS)
    before, rest = page.split(begin)
    return "\n\n".join((f"{before}{begin}", *tables, f"{end}{rest.split(end)[1]}"))


def main() -> None:
    path = ROOT / "docs" / "performance.md"
    on_cpu, on_gpu = (
        json.loads((ROOT / "benchmarks" / "results" / name).read_text())
        for name in ("overhead.json", "overhead_cuda.json")
    )
    models = on_cpu["models"]
    tables = [in_training(models), engines(models), overheads(models), growth(on_cpu["growth"])]
    page = between(path.read_text(), "tables", tables)
    models = on_gpu["models"]
    path.write_text(between(page, "tables of a GPU", [in_training(by_precision(models)), engines(models)]))


if __name__ == "__main__":
    main()
