"""Make the tables and the figure of docs/race.md from benchmarks/results/race.json and race_defaults.json.

python benchmarks/race_report.py [--results benchmarks/results] [--page docs/race.md]
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from race_contestants import DEFAULT
from results import COLOURS

ROOT = Path(__file__).resolve().parent.parent
DRAWN = ("small", "best fixed", "Doubling", "DiveBatch", DEFAULT)

Run = Mapping[str, Any]
BySeed = dict[int, Run]


def by_contestant(runs: Sequence[Run]) -> dict[str, BySeed]:
    """Return each contestant's runs by their seeds, in the order of the race's list."""
    found: dict[str, BySeed] = {}
    for run in runs:
        found.setdefault(run["contestant"], {})[run["seed"]] = run
    return found


def paired(ours: BySeed, theirs: BySeed, value: Callable[[Run, Run], float | None]) -> list[float]:
    """Return a comparison's values over the seeds that both have run, without those where one has no value."""
    values = (value(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys()))
    return [found for found in values if found is not None]


def ratio(field: str) -> Callable[[Run, Run], float | None]:
    """Compare one number of two runs; None where one of them never reached the target."""

    def of(ours: Run, theirs: Run) -> float | None:
        return None if ours[field] is None or theirs[field] is None else ours[field] / theirs[field]

    return of


def range_of(values: Sequence[float], digits: str = ".2f", *, of: int | None = None) -> str:
    """Write the median and the range; of how many, where those are fewer than there should be."""
    if not values:
        return "-" if of is None else "never"
    text = f"{statistics.median(values):{digits}}"
    if min(values) < max(values):
        text += f" ({min(values):{digits}} to {max(values):{digits}})"
    return text if of is None or len(values) == of else f"{text}, {len(values)} of {of}"


def is_missed(ours: Run, theirs: Run) -> bool:
    """Return whether the target was reached by theirs alone."""
    return ours["seconds_to_target"] is None and theirs["seconds_to_target"] is not None


def losses(track: Mapping[str, Any]) -> list[str]:
    """Return a line for each way in which a contestant beats ours at its defaults."""
    contestants = by_contestant(track["runs"])
    ours = contestants.pop(DEFAULT, None)
    if ours is None:
        return []
    lines = []
    target = f"{100 * track['settings']['target']:g} %"
    for name, theirs in contestants.items():
        ratios = paired(ours, theirs, ratio("seconds_to_target"))
        missed = sum(paired(ours, theirs, is_missed))
        if ratios and statistics.median(ratios) > 1:
            lines.append(
                f"- {track['title']}: **{label(track, name)}** reaches {target} faster: ours takes "
                f"{range_of(ratios)} times its seconds."
            )
        if missed:
            lines.append(
                f"- {track['title']}: {label(track, name)} reaches {target} on {missed} of {len(ours)} seeds "
                "on which ours does not."
            )
        points = paired(ours, theirs, more_accurate)
        if points and max(points) < 0:
            lines.append(
                f"- {track['title']}: **{label(track, name)}** ends more accurate on every seed: ours by "
                f"{range_of(points, '+.2f')} points."
            )
    return lines


def label(track: Mapping[str, Any], name: str) -> str:
    """Return a contestant's name in the tables: with what it is, where a group's best one raced."""
    contestant = track["entrants"][name][0]
    sizes = {"small": "small", "large": "large"}
    if name in sizes:
        return f"{name}, fixed {track['settings'][sizes[name]]}"
    return name if contestant == name else f"{name}: {contestant.removeprefix(name).strip(', ') or contestant}"


def overview(tracks: Sequence[Mapping[str, Any]]) -> str:
    """Write a line for each track: the middle seconds to the target of those that count, and what ours costs."""
    head = (
        "median seconds to target",
        *DRAWN[:-1],
        f"**{DEFAULT}**",
        "steps in all, small over ours",
        "final accuracy, ours less small, points",
    )
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for track in tracks:
        contestants = by_contestant(track["runs"])
        ours, small = contestants.get(DEFAULT, {}), contestants.get("small", {})
        cells = [f"{track['title']}, {100 * track['settings']['target']:g} %"]
        cells += [median_of(list(contestants.get(name, {}).values())) for name in DRAWN]
        cells.append(range_of(paired(small, ours, ratio("steps")), ".1f"))
        cells.append(range_of(paired(ours, small, more_accurate), "+.2f"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def median_of(runs: Sequence[Run]) -> str:
    """Write the middle of the seconds to the target, where at least half of the runs reach it."""
    seconds = [math.inf if run["seconds_to_target"] is None else run["seconds_to_target"] for run in runs]
    middle = statistics.median(seconds) if seconds else math.inf
    return f"{middle:.1f}" if math.isfinite(middle) else "-"


def more_accurate(ours: Run, theirs: Run) -> float:
    return 100 * (ours["accuracy"] - theirs["accuracy"])


def table(track: Mapping[str, Any]) -> str:
    contestants = by_contestant(track["runs"])
    small = contestants.get("small", {})
    head = (
        "contestant",
        "rate",
        "seconds to target",
        "over small",
        "steps to target",
        "steps in all",
        "seconds in all",
        "final accuracy, %",
        "final batch",
        "measuring",
    )
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, runs in contestants.items():
        values = list(runs.values())
        accuracies = [100 * run["accuracy"] for run in values]
        deviation = f" ± {statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
        cells = (
            f"**{label(track, name)}**" if name == DEFAULT else label(track, name),
            f"{values[0]['rate']:.3g}",
            range_of(reached(values, "seconds_to_target"), ".1f", of=len(values)),
            range_of(paired(runs, small, ratio("seconds_to_target"))) if name != "small" else "1",
            range_of(reached(values, "steps_to_target"), ",.0f", of=len(values)),
            f"{statistics.median(run['steps'] for run in values):,.0f}",
            f"{statistics.median(run['seconds'] for run in values):.1f}",
            f"{statistics.fmean(accuracies):.2f}{deviation}",
            range_of([run["batch_size"] for run in values], ".0f"),
            measuring(values),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def reached(runs: Sequence[Run], field: str) -> list[float]:
    return [run[field] for run in runs if run[field] is not None]


def measuring(runs: Sequence[Run]) -> str:
    """Write the share of all seconds that went into measuring: seen from outside, else by the callback's account."""
    if "measurements" not in runs[0]:
        return "-"
    fields = ["overhead_logged" if run["overhead_seen"] is None else "overhead_seen" for run in runs]
    share = statistics.median(run[field] / run["seconds"] for run, field in zip(runs, fields, strict=True))
    return f"{share:.1%}"


def claims(track: Mapping[str, Any]) -> str:
    """Compare ours at its defaults with those that count, seed by seed."""
    contestants = by_contestant(track["runs"])
    ours = contestants.get(DEFAULT)
    if ours is None:
        return ""
    lines = []
    if "small" in contestants:
        small = contestants["small"]
        points = paired(ours, small, more_accurate)
        lines += [
            f"| seconds to target, small over ours | {range_of(paired(small, ours, ratio('seconds_to_target')))} |",
            f"| seconds in all, small over ours | {range_of(paired(small, ours, ratio('seconds')))} |",
            f"| steps in all, small over ours | {range_of(paired(small, ours, ratio('steps')), '.1f')} |",
            f"| final accuracy, ours less small, points | {range_of(points, '+.2f')} |",
        ]
    for rival in ("best fixed", "large", "Doubling", "DiveBatch"):
        if rival in contestants:
            values = paired(ours, contestants[rival], ratio("seconds_to_target"))
            text = range_of(values, of=len(ours)) if values else "one of them never reaches it"
            lines.append(f"| seconds to target, ours over {rival} | {text} |")
    return "\n".join(["| paired by seed, median and range | |", "|---|---|", *lines])


def grids(track: Mapping[str, Any]) -> str:
    """Write each contestant's grid: seconds to the target at each rate, or the accuracy where it is not reached."""
    lines = [
        "| contestant | rate: seconds to target on one seed, or accuracy if not reached | the best two, on three |",
        "|---|---|---|",
    ]
    racing = dict(track["entrants"].values())
    for name, grid in track["tuning"].items():
        cells = [found_at(entry) for entry in grid]
        finals = [
            f"**{found_at(entry)}**" if racing.get(name) == entry["rate"] else found_at(entry)
            for entry in track["finals"][name]
        ]
        lines.append(f"| {name} | {'; '.join(cells)} | {'; '.join(finals)} |")
    return "\n".join(lines)


def found_at(entry: Mapping[str, Any]) -> str:
    seconds = entry["seconds_to_target"]
    return f"{entry['rate']:.3g}: " + (f"{100 * entry['accuracy']:.1f} %" if seconds is None else f"{seconds:.1f}")


def section(track: Mapping[str, Any]) -> str:
    settings, machine, versions = track["settings"], track["machine"], track["versions"]
    phases = "; ".join(
        f"{settings[phase]['jobs']} at a time on {settings[phase]['threads'] or 'all'} thread(s) each ({what})"
        for phase, what in (("tuning", "tuning"), ("racing", "race"))
    )
    seeds = len({run["seed"] for run in track["runs"]})
    facts = (
        f"{settings['data']}; {settings['epochs']} epochs, target {100 * settings['target']:g} %, batch from "
        f"{settings['small']}, at most {settings['large']}, {seeds} seeds. {machine['processor']}, {machine['cores']} "
        f"cores{', ' + machine['gpu'] if machine['gpu'] else ''}; runs: {phases}. torch {versions['torch']}, lightning "
        f"{versions['lightning']}."
    )
    crowded = sum(run["load"] > machine["cores"] + 1 for run in track["runs"])
    if crowded:
        facts += (
            f" **During {crowded} of {len(track['runs'])} runs the machine had other work**, too: seconds are rough."
        )
    changed = settings["overrides"]
    if changed:
        facts += (
            " Arguments of the callback other than its defaults: "
            + ", ".join(f"{k}={v}" for k, v in changed.items())
            + "."
        )
    parts = [f"## {track['title']}", facts, table(track), claims(track)]
    if track["failed"]:
        parts.append(f"**{len(track['failed'])} runs failed** and are left out; their tracebacks are in the results.")
    parts += ["<details><summary>Learning rates tried</summary>", grids(track)]
    if track.get("tuned_before"):
        names = ", ".join(track["tuned_before"])
        parts.append(f"Tuned for an earlier race, with the same seeds, two runs at a time on a thread each: {names}.")
    parts.append("</details>")
    return "\n\n".join(part for part in parts if part)


def sweep_table(track: Mapping[str, Any]) -> str:
    """Compare the callback with one argument changed to the callback as it comes, seed by seed."""
    groups: dict[str, BySeed] = {}
    for run in track["runs"]:
        name = ", ".join(f"{key}={value}" for key, value in run["overrides"].items())
        groups.setdefault(name, {})[run["seed"]] = run
    base = groups[""]
    lines = [
        "| changed | seconds to target | over the defaults | steps in all | accuracy, % | final batch | measuring |",
        "|---" * 7 + "|",
    ]
    for name, runs in groups.items():
        values = list(runs.values())
        cells = (
            name or "nothing",
            range_of(reached(values, "seconds_to_target"), ".1f", of=len(values)),
            range_of(paired(runs, base, ratio("seconds_to_target"))) if name else "1",
            f"{statistics.median(run['steps'] for run in values):,.0f}",
            f"{statistics.fmean(100 * run['accuracy'] for run in values):.2f}",
            range_of([run["batch_size"] for run in values], ".0f"),
            measuring(values),
        )
        lines.append("| " + " | ".join(cells) + " |")
    seeds = len(base)
    return f"{track['title']}, {seeds} seeds, rate {track['rate']:.3g}.\n\n" + "\n".join(lines)


def figure(track: Mapping[str, Any], path: Path) -> None:
    """Draw accuracy against seconds, and the batch over the examples, for every seed."""
    drawing = Figure(figsize=(10, 4), layout="constrained")
    left, right = drawing.subplots(1, 2)
    contestants = by_contestant(track["runs"])
    for name, colour in zip(DRAWN, COLOURS, strict=False):
        for i, run in enumerate(contestants.get(name, {}).values()):
            curve = run["curve"]
            style = {"color": colour, "linewidth": 1.2, "alpha": 0.7, "label": None if i else label(track, name)}
            left.plot(curve["seconds"], [100 * value for value in curve["accuracy"]], **style)
            right.step([n / track["settings"]["examples"] for n in curve["examples"]], curve["batch_size"], **style)
    target = 100 * track["settings"]["target"]
    shown = [
        seconds
        for run in track["runs"]
        for seconds, found in zip(run["curve"]["seconds"], run["curve"]["accuracy"], strict=True)
        if 100 * found > target - 8
    ]
    left.axhline(target, color="0.4", linewidth=0.8, linestyle="--")
    best = max(100 * run["accuracy"] for run in track["runs"])
    left.set(
        xlabel="seconds, all but evaluating", ylabel="test accuracy, %", ylim=(target - 8, best + 0.5), xscale="log"
    )
    left.set_xlim(left=0.8 * min(shown))
    right.set(xlabel="epochs", ylabel="effective batch size")
    right.set_yscale("log", base=2)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="0.9", linewidth=0.8)
    left.legend(frameon=False, fontsize=8)
    drawing.suptitle(f"{track['title']}: every seed", fontsize=10)
    drawing.savefig(path, dpi=130)


def fill(text: str, name: str, content: str) -> str:
    """Put content between two markers of a page."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{content}\n\n{end}{rest.split(end)[1]}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "race.md")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="filled where it has the markers")
    options = parser.parse_args(arguments)
    path = options.results / "race.json"
    if not path.exists():
        raise SystemExit(f"There is no {path}: run benchmarks/race.py first.")
    tracks = json.loads(path.read_text())["tracks"]
    raced = {name: track for name, track in tracks.items() if track.get("runs")}
    lost = [line for track in raced.values() for line in losses(track)]
    page = options.page.read_text()
    page = fill(page, "losses", "\n".join(lost) or "Nowhere, in what was raced: which says more of what was raced.")
    page = fill(page, "overview", overview(list(raced.values())))
    page = fill(page, "tracks", "\n\n".join(section(track) for track in raced.values()))
    sweep = options.results / "race_defaults.json"
    if sweep.exists():
        page = fill(page, "defaults", "\n\n".join(map(sweep_table, json.loads(sweep.read_text())["tracks"].values())))
    options.page.write_text(page)
    if options.readme.exists() and "<!-- overview: begin -->" in (readme := options.readme.read_text()):
        options.readme.write_text(fill(readme, "overview", overview(list(raced.values()))))
    if raced:
        figure(raced.get("fashion-mlp", next(iter(raced.values()))), options.results / "race.png")


if __name__ == "__main__":
    main()
