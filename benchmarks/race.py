"""The race: seconds and optimizer steps to a fixed accuracy, and the accuracy after the same number of examples.

    python benchmarks/race.py --track fashion-mlp [--seeds 5] [--contestants small "best fixed" ...] [--tune-only]
    python benchmarks/race.py --quick   # under three minutes on two cores
    python benchmarks/race.py --sweep   # the callback's arguments, one at a time
    python benchmarks/race_report.py    # tables and figure of docs/race.md

Every contestant first has its learning rate tuned, on a grid and a seed of its own; then all race with the same seeds:
the same initial weights, the same order of the examples. The clock counts everything but evaluating, measuring too.
Every finished run is kept in OUT/runs.jsonl (with --sweep: sweep.jsonl), so that an interrupted race goes on where it
was. Writes race.json (with --sweep: race_defaults.json, with --quick: race_quick.json), one entry for each track.
"""

import argparse
import json
import os
import platform
import random
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lightning
import race_tracks
import torch
from race_contestants import CONTESTANTS, DEFAULT, Contestant
from race_run import Plan, begin, quiet, run
from race_tracks import TRACKS, Phase, Track
from results import rounded

import lightning_graddiv

ROOT = Path(__file__).resolve().parent.parent
TUNING_SEED = 1000
FINAL_SEEDS = (1001, 1002)
"""On which the best rates of a grid are compared again: one seed's luck is worth more than a factor of two."""
FINALISTS = 2

EXTENSIONS = 2
"""How often a grid grows beyond its edge, where the best rate lies on it."""

WAY_TO_LARGE = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
"""The large batch's grid: multiples of the small one's rate, scaled by the linear rule."""

OVERRIDES = ("every_n_steps", "cooldown", "window", "growth_factor", "confidence", "scale_lr", "warm_in")

QUICK: dict[str, Any] = {"epochs": 4, "target": 0.87}
QUICK_CONTESTANTS = ("small", "fixed 256", "Doubling", DEFAULT)
QUICK_RATES = {"small": 0.01, "fixed 256": 0.04, "Doubling": 0.01, DEFAULT: 0.01}
"""Where no race has been run: what smoke runs say."""

SWEEP: dict[str, tuple[Any, ...]] = {
    "every_n_steps": (25, 50, 100, 200),
    "cooldown": (2, 4, 8),
    "window": (8, 16),
    "confidence": (0.6, 0.8, 0.9),
    "growth_factor": (2, 4),
    "scale_lr": ("gain", "linear", "sqrt"),
    "warm_in": (0, 4, 20),
}

Result = dict[str, Any]


class Runs:
    """Finished runs, each appended to a file at once and found again by all that it depends on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self._results = {as_text(entry["key"]): entry["result"] for entry in map(json.loads, lines)}
        self.failed: list[Result] = []
        self._pool: ProcessPoolExecutor | None = None
        self._phase: Phase | None = None

    def __contains__(self, plan: Plan) -> bool:
        return as_text(plan.key()) in self._results

    def __getitem__(self, plan: Plan) -> Result:
        return self._results[as_text(plan.key())]

    def add(self, plan: Plan, result: Result) -> None:
        """Keep a result; a failure is told at once, told again in the results, and tried again the next time."""
        if "failed" in result:
            print(f"\nFAILED: {plan}\n{result['failed']}", file=sys.stderr, flush=True)
            self.failed.append({"contestant": plan.contestant, "rate": plan.rate, "seed": plan.seed, **result})
            return
        result = rounded(result)
        with self.path.open("a") as file:
            file.write(json.dumps({"key": plan.key(), "result": result}, default=str) + "\n")
        self._results[as_text(plan.key())] = result

    def run(self, plans: Sequence[Plan], phase: Phase, data_dir: Path | None) -> None:
        """Run those plans that have not been run, each in a process on cores of its own."""
        missing = list({as_text(plan.key()): plan for plan in plans if plan not in self}.values())
        if not missing:
            return
        if phase.jobs == 0:
            for plan in missing:
                self.add(plan, run(plan))
            return
        pool = self.pool(phase, missing[0].track, data_dir)
        started = time.perf_counter()
        futures = {pool.submit(run, plan): plan for plan in missing}
        for count, future in enumerate(as_completed(futures), start=1):
            plan, result = futures[future], future.result()
            self.add(plan, result)
            if "failed" not in result:
                spent = time.perf_counter() - started
                print(f"{spent:6.0f} s  {count:3}/{len(futures)}  {line(plan, result)}", flush=True)

    def pool(self, phase: Phase, track: str, data_dir: Path | None) -> ProcessPoolExecutor:
        """Return processes that have read the track's data; those of another phase end before."""
        if self._pool is None or self._phase != phase:
            self.close()
            shares = cores_of(phase)
            context = get_context("spawn")
            queue = context.Queue()
            for share in shares:
                queue.put(share)
            self._pool = ProcessPoolExecutor(
                len(shares), mp_context=context, initializer=begin, initargs=(queue, track, data_dir)
            )
            self._phase = phase
        return self._pool

    def close(self) -> None:
        """End the processes that run."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def cores_of(phase: Phase) -> list[list[int]]:
    """Return the cores of each job: as many jobs as there are cores for, at most those that are wanted."""
    cores = sorted(os.sched_getaffinity(0))
    threads = min(phase.threads or len(cores), len(cores))
    jobs = max(1, min(phase.jobs, len(cores) // threads))
    return [cores[job * threads : (job + 1) * threads] for job in range(jobs)]


def line(plan: Plan, result: Result) -> str:
    reached = result["seconds_to_target"]
    to_target = "not reached" if reached is None else f"{reached:7.1f} s"
    overrides = "".join(f" {name}={value}" for name, value in plan.overrides.items())
    return (
        f"{plan.contestant + overrides:26} rate {plan.rate:<8.4g} seed {plan.seed:<5} to target {to_target:>11}   "
        f"{result['seconds']:6.1f} s, {result['steps']:6.0f} steps: {100 * result['accuracy']:.2f} %, "
        f"batch {result['batch_size']:.0f}"
    )


@dataclass(frozen=True)
class Race:
    """How a track is raced.

    Attributes:
        track: what is raced on.
        runs: finished ones.
        epochs: passes over the examples.
        target: accuracy to reach.
        overrides: arguments of the callback other than its defaults, for every adaptive contestant.
        data_dir: folder of the images.
    """

    track: Track
    runs: Runs
    epochs: int
    target: float
    overrides: Mapping[str, Any]
    data_dir: Path | None = None

    def plan(self, contestant: str, rate: float, seed: int, phase: Phase, **options: Any) -> Plan:
        shares = cores_of(phase)
        is_grown = CONTESTANTS[contestant].policy is not None
        overrides = {**(self.overrides if is_grown else {}), **options.pop("overrides", {})}
        return Plan(
            self.track.name,
            contestant,
            rate,
            seed,
            threads=len(shares[0]),
            jobs=len(shares),
            epochs=self.epochs,
            target=self.target,
            overrides=overrides,
            **options,
        )

    def tune(self, grids: Mapping[str, Sequence[float]]) -> dict[str, dict[float, Result]]:
        """Run each contestant at each of its rates, and beyond the edge of its grid while the best rate lies on it."""
        grids = {name: sorted(grid) for name, grid in grids.items()}
        for extension in range(EXTENSIONS + 1):
            plans = {(name, rate): self.tuning_plan(name, rate) for name, grid in grids.items() for rate in grid}
            self.runs.run(list(plans.values()), self.track.tuning, self.data_dir)
            found = {
                name: {rate: self.runs[plans[name, rate]] for rate in grid if plans[name, rate] in self.runs}
                for name, grid in grids.items()
            }
            if extension < EXTENSIONS:
                grids = {name: extended(grid, best_rate(found[name])) for name, grid in grids.items()}
        return found

    def tuning_plan(self, name: str, rate: float, seed: int = TUNING_SEED) -> Plan:
        return self.plan(name, rate, seed, self.track.tuning, ends_at_target=True)

    def compare_again(self, tuned: Mapping[str, Mapping[float, Result]]) -> dict[str, dict[float, Result]]:
        """Run each contestant's best rates with more seeds; return the means over all of its tuning seeds."""
        rates = {name: sorted(found, key=lambda rate: score(found[rate]))[:FINALISTS] for name, found in tuned.items()}
        plans = {
            (name, rate): [self.tuning_plan(name, rate, seed) for seed in FINAL_SEEDS]
            for name, best in rates.items()
            for rate in best
        }
        self.runs.run([plan for some in plans.values() for plan in some], self.track.tuning, self.data_dir)
        return {
            name: {
                rate: mean([tuned[name][rate], *(self.runs[plan] for plan in plans[name, rate] if plan in self.runs)])
                for rate in best
            }
            for name, best in rates.items()
        }

    def race(self, entrants: Mapping[str, tuple[str, float]], seeds: Iterable[int]) -> list[Result]:
        """Run every entrant, a contestant and its rate, with every seed; those of a seed in an order of chance."""
        plans = []
        for seed in seeds:
            names = list(entrants)
            random.Random(seed).shuffle(names)
            plans += [(name, self.plan(*entrants[name], seed, self.track.racing)) for name in names]
        self.runs.run([plan for _, plan in plans], self.track.racing, self.data_dir)
        return [
            {"contestant": name, "is": plan.contestant, "rate": plan.rate, "seed": plan.seed, **self.runs[plan]}
            for name, plan in plans
            if plan in self.runs
        ]


def extended(grid: Sequence[float], best: float | None) -> list[float]:
    """Return the grid with a rate more beyond the edge that the best one lies on."""
    if best == grid[0]:
        return [best / 2, *grid]
    if best == grid[-1]:
        return [*grid, 2 * best]
    return list(grid)


def score(result: Result) -> tuple[bool, float]:
    """Return what the best of several runs has least of: seconds to the target, or then what lacks in accuracy."""
    seconds = result["seconds_to_target"]
    return (True, -result["accuracy"]) if seconds is None else (False, seconds)


def mean(results: Sequence[Result]) -> Result:
    """Return the means of several runs at one rate; it reaches the target if all of them do."""
    fields = ("seconds_to_target", "accuracy", "seconds", "batch_size")
    columns = {field: [result[field] for result in results] for field in fields}
    return {field: None if None in column else sum(column) / len(column) for field, column in columns.items()}


def best_rate(results: Mapping[float, Result]) -> float | None:
    return min(results, key=lambda rate: score(results[rate]), default=None)


def names_on(track: Track) -> list[str]:
    """Return the contestants of a track, without those whose batch is none of its own."""
    fixed = {f"fixed {size}" for size in track.between}
    return [name for name, c in CONTESTANTS.items() if c.group != "best fixed" or name in fixed]


def chosen(track: Track, wanted: Sequence[str] | None) -> list[str]:
    """Return the contestants that are asked for by name or by their group's name; all where none is asked for."""
    names = names_on(track)
    groups = {CONTESTANTS[name].group for name in names}
    unknown = set(wanted or ()) - set(names) - groups
    if unknown:
        raise SystemExit(f"No contestants of this track: {', '.join(sorted(unknown))}. There are: {', '.join(names)}.")
    return [name for name in names if not wanted or name in wanted or CONTESTANTS[name].group in wanted]


def grid_around(track: Track, contestant: Contestant) -> list[float]:
    middle = track.rate * contestant.rate_scale(track)
    return [middle * 2.0**power for power in range(-(track.grid // 2), track.grid - track.grid // 2)]


def tune_all(
    race: Race, names: Sequence[str], known: Mapping[str, Mapping[float, Result]]
) -> dict[str, Mapping[float, Result]]:
    """Tune every contestant but the known ones; the large batch comes last: its grid hangs on the small one's rate."""
    track = race.track
    needs_small = "large" in names and "large" not in known
    needed = dict.fromkeys([*(["small"] if needs_small else []), *names])
    first = {name: grid_around(track, CONTESTANTS[name]) for name in needed if name not in {"large", *known}}
    found: dict[str, Mapping[float, Result]] = {**known, **race.tune(first)}
    if needs_small:
        small = best_rate(found["small"])
        if small is None:
            raise SystemExit("No run of the small batch came to an end: there is no rate to scale for the large one.")
        ratio = track.large / track.small
        found |= race.tune({"large": [small * ratio * share for share in WAY_TO_LARGE[-track.grid :]]})
    return {name: found[name] for name in names}


def entrants_of(tuned: Mapping[str, Mapping[float, Result]]) -> dict[str, tuple[str, float]]:
    """Return who races at which rate: of a group the best."""
    entrants: dict[str, tuple[str, float]] = {}
    best: dict[str, tuple[bool, float]] = {}
    for name, results in tuned.items():
        rate = best_rate(results)
        if rate is None:
            continue
        entry = CONTESTANTS[name].group or name
        if entry not in best or score(results[rate]) < best[entry]:
            entrants[entry], best[entry] = (name, rate), score(results[rate])
    return entrants


def grids_for_results(tuned: Mapping[str, Mapping[float, Result]]) -> dict[str, list[Result]]:
    kept = ("seconds_to_target", "accuracy", "seconds", "batch_size")
    return {
        name: [{"rate": rate, **{key: result[key] for key in kept}} for rate, result in sorted(results.items())]
        for name, results in tuned.items()
    }


def environment() -> dict[str, Any]:
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "lightning_graddiv": lightning_graddiv.__version__,
        },
        "machine": {
            "processor": processor(),
            "cores": len(os.sched_getaffinity(0)),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    rows = info.read_text().splitlines() if info.exists() else []
    return next((row.split(":")[1].strip() for row in rows if row.startswith("model name")), platform.machine())


def as_text(key: Any) -> str:
    return json.dumps(key, sort_keys=True, default=str)


def save(path: Path, name: str, entry: Mapping[str, Any]) -> None:
    """Put a track's entry into the file, beside those of other tracks; a run of a list takes a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.loads(path.read_text()) if path.exists() else {"tracks": {}}
    content["tracks"][name] = rounded(entry)
    path.write_text(compact(content) + "\n")
    print(f"written to {path}", flush=True)


def compact(content: Any, indent: str = "") -> str:
    """Write JSON with one line for what is no deeper than a run."""
    flat = json.dumps(content)
    is_run = isinstance(content, dict) and "curve" in content
    if len(flat) < 110 or is_run or not isinstance(content, dict | list):
        return flat
    inner = indent + " "
    if isinstance(content, dict):
        rows = [f"{json.dumps(name)}: {compact(value, inner)}" for name, value in content.items()]
        return "{\n" + ",\n".join(inner + row for row in rows) + f"\n{indent}}}"
    return "[\n" + ",\n".join(inner + compact(value, inner) for value in content) + f"\n{indent}]"


def described(race: Race, command: Sequence[str]) -> dict[str, Any]:
    """Return what a track's results came from."""
    track = race.track
    return {
        "title": track.title,
        "command": shlex.join(["python", "benchmarks/race.py", *without_folders(command)]),
        **environment(),
        "settings": {
            **track.settings(),
            "epochs": race.epochs,
            "target": race.target,
            "data": track.data().source,
            "examples": len(track.data().train[0]),
            "overrides": dict(race.overrides),
            "tuning_seed": TUNING_SEED,
            "final_seeds": FINAL_SEEDS,
            "extensions": EXTENSIONS,
        },
    }


def without_folders(command: Sequence[str]) -> list[str]:
    """Leave out where files lie on this machine."""
    folders = {"--data-dir", "--out", "--results"}
    following = [None, *command]
    pairs = [(word.partition("=")[0], before) for word, before in zip(command, following, strict=False)]
    return [word for word, (name, before) in zip(command, pairs, strict=True) if not {name, before} & folders]


def run_track(race: Race, options: argparse.Namespace, command: Sequence[str]) -> None:
    names = chosen(race.track, options.contestants)
    known = chosen(race.track, options.tuned) if options.tuned else []
    known_tuning, known_finals = tuned_before(race, known)
    tuned = tune_all(race, names, known_tuning)
    finals = race.compare_again({name: tuned[name] for name in names if name not in known})
    finals = {name: (finals | known_finals)[name] for name in names}
    entrants = entrants_of(finals)
    grids = {"tuning": grids_for_results(tuned), "finals": grids_for_results(finals)}
    entry = {
        **described(race, command),
        **grids,
        "tuned_before": [name for name in names if name in known],
        "entrants": entrants,
    }
    if not options.tune_only:
        entry["runs"] = race.race(entrants, range(options.seeds))
    save(options.results / "race.json", race.track.name, {**entry, "failed": race.runs.failed})


def run_quick(race: Race, options: argparse.Namespace, command: Sequence[str]) -> None:
    raced = raced_rates(race.track)
    entrants = {name: (name, rate) for name, rate in QUICK_RATES.items()} | {
        name: raced[name] for name in ("small", "best fixed", "Doubling", DEFAULT) if name in raced
    }
    if "best fixed" in entrants:
        entrants = {name: entry for name, entry in entrants.items() if not name.startswith("fixed ")}
    runs = race.race(entrants, range(options.seeds))
    entry = {**described(race, command), "entrants": entrants, "runs": runs, "failed": race.runs.failed}
    save(options.results / "race_quick.json", race.track.name, entry)
    for name in entrants:
        reached = [run["seconds_to_target"] for run in runs if run["contestant"] == name]
        print(f"{name:22} seconds to {100 * race.target:g} %: {reached}")


def committed(track: Track) -> Mapping[str, Any]:
    """Return what the committed results hold of a track."""
    path = ROOT / "benchmarks" / "results" / "race.json"
    tracks = json.loads(path.read_text())["tracks"] if path.exists() else {}
    return tracks.get(track.name, {})


def raced_rates(track: Track) -> dict[str, tuple[str, float]]:
    """Return the committed race's entrants on a track."""
    found = committed(track).get("entrants", {})
    return {name: (contestant, rate) for name, (contestant, rate) in found.items()}


def tuned_before(race: Race, names: Sequence[str]) -> list[dict[str, dict[float, Result]]]:
    """Return the committed grids of those contestants and of their best rates.

    They must be of the same training. The callback's arguments may have been others then.
    """
    entry, asked = committed(race.track), described(race, ())["settings"]
    fixed = asked.keys() - {"tuning", "racing", "overrides"}
    then = entry.get("settings", {})
    others = [name for name in sorted(fixed) if as_text(asked[name]) != as_text(then.get(name))]
    missing = [name for name in names if name not in entry.get("finals", {})]
    if names and (missing or others):
        reason = f"not of {', '.join(missing)}" if missing else f"of another training ({', '.join(others)})"
        raise SystemExit(f"--tuned: the committed results of {race.track.name} are {reason}.")
    return [{name: {row["rate"]: row for row in entry[grid][name]} for name in names} for grid in ("tuning", "finals")]


def run_sweep(race: Race, options: argparse.Namespace, command: Sequence[str]) -> None:
    """Race the callback with one argument at a time other than its default, at the rate that suits its defaults."""
    _, rate = raced_rates(race.track).get(DEFAULT, (DEFAULT, QUICK_RATES[DEFAULT]))
    defaults = race.plan(DEFAULT, rate, 0, race.track.racing).key()["callback"]
    varied = [{}] + [{name: value} for name, values in SWEEP.items() for value in values if value != defaults[name]]
    phase = race.track.racing
    plans = [
        race.plan(DEFAULT, rate, seed, phase, overrides=extra) for seed in range(options.seeds) for extra in varied
    ]
    race.runs.run(plans, phase, race.data_dir)
    runs = [
        {"overrides": dict(plan.overrides), "seed": plan.seed, **race.runs[plan]} for plan in plans if plan in race.runs
    ]
    entry = {**described(race, command), "rate": rate, "defaults": defaults, "runs": runs, "failed": race.runs.failed}
    save(options.results / "race_defaults.json", race.track.name, entry)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--track", nargs="+", choices=TRACKS, help="default: all; with --quick and --sweep: fashion-mlp"
    )
    parser.add_argument("--contestants", nargs="+", help="names, or `best fixed` and `DiveBatch`; default: all")
    parser.add_argument("--tuned", nargs="+", help="those not to tune again: as in the committed results")
    parser.add_argument("--seeds", type=int, help="default 5, with --quick 2, with --sweep 3")
    parser.add_argument("--epochs", type=int, help="instead of the track's")
    parser.add_argument("--target", type=float, help="accuracy to reach, instead of the track's")
    parser.add_argument("--tune-only", action="store_true", help="find the rates and stop")
    parser.add_argument("--racing", nargs=2, type=int, metavar=("JOBS", "THREADS"), help="0 threads: all cores")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_true", help="a small race, at rates that were found before")
    mode.add_argument("--sweep", action="store_true", help="vary the callback's arguments one at a time")
    parser.add_argument("--data-dir", type=Path, help="folder of the images' usual files, instead of fetching them")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "race", help="folder of finished runs")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON")
    for name in OVERRIDES:
        kind = {"confidence": float, "scale_lr": str}.get(name, int)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help="of AdaptiveBatchSize")
    options = parser.parse_args(arguments)
    if options.tuned and (options.quick or options.sweep):
        parser.error("--tuned is of a whole race: --quick and --sweep tune nothing.")
    options.track = options.track or (["fashion-mlp"] if options.quick or options.sweep else list(TRACKS))
    options.seeds = options.seeds or (2 if options.quick else 3 if options.sweep else 5)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    quiet()
    mode: Callable[[Race, argparse.Namespace, Sequence[str]], None]
    mode = run_quick if options.quick else run_sweep if options.sweep else run_track
    failures = 0
    for name in options.track:
        track = TRACKS[name]
        if track.needs_cuda and not torch.cuda.is_available():
            print(f"{name} needs a GPU, and there is none here: skipped.")
            continue
        race_tracks.DATA_DIR = options.data_dir
        track.data()  # fetched once, before several processes want it
        if options.racing or options.quick:
            track = replace(track, racing=Phase(*(options.racing or (1, 1))))
        preset = QUICK if options.quick else {}
        race = Race(
            track,
            Runs(options.out / ("sweep.jsonl" if options.sweep else "runs.jsonl")),  # not a race's of hours ago
            epochs=options.epochs or preset.get("epochs", track.epochs),
            target=options.target or preset.get("target", track.target),
            overrides={key: getattr(options, key) for key in OVERRIDES if getattr(options, key) is not None},
            data_dir=options.data_dir,
        )
        try:
            mode(race, options, sys.argv[1:] if arguments is None else list(arguments))
        finally:
            race.runs.close()
        failures += len(race.runs.failed)
    if failures:
        raise SystemExit(f"{failures} runs failed: their tracebacks are above and in the results.")


if __name__ == "__main__":
    main()
