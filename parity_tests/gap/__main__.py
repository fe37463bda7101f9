"""Where MobileNet's accuracy goes: the study that the project exists for.

    python -m parity_tests.gap [--quick] [--out DIR] [--publish [gap-again]]

trains every arm in jaxfed, and the arms of the chain also in TFF and Keras, and writes `gap.json`
and `report.html` to DIR. An interrupted study goes on where it was. `--publish` also writes what is
committed: `docs/results/gap.json`, `docs/gap.md` with its pictures, and the README's first screen;
`--publish gap-again` that it was made once more, on another machine. Without it, the whole study
says what it concludes otherwise than what is committed.
"""

import argparse
import hashlib
import importlib.metadata
import itertools
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxfed import ConfigError, DataError
from jaxfed.config import to_dict
from jaxfed.folder import write_atomically, write_json
from jaxfed.run import device_name
from parity_tests.gap import pages
from parity_tests.gap.arms import FULL, QUICK, Arm, Setting, arms
from parity_tests.gap.effects import Runs
from parity_tests.gap.findings import findings, otherwise
from parity_tests.gap.trials import Programs, Run, in_jaxfed, in_reference
from tff_reference import environment
from tff_reference.process import ROOT, Worker

COMMAND = "python -m parity_tests.gap"
RESULTS = ROOT / "docs" / "results"
PUBLISHED, AGAIN = RESULTS / "gap.json", RESULTS / "gap-again.json"
SAME = "every conclusion and every verdict is as published in docs/results/gap.json"
SUMMARY = "Where MobileNet's accuracy goes: Keras, jaxfed and TFF, one change at a time."


def main(arguments: list[str] | None = None) -> int:
    """Runs the study; exit code 0, or 2 for bad input, 130 if interrupted."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=SUMMARY)
    parser.add_argument("--quick", action="store_true", help="2 arms, in a few minutes")
    parser.add_argument("--out", type=Path, default=Path("gap"), help="default: %(default)s")
    parser.add_argument(
        "--publish", nargs="?", const=PUBLISHED.stem, choices=[PUBLISHED.stem, AGAIN.stem],
        help="also write what is committed; gap-again: as a repetition of what is there",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.quick and options.publish:
        parser.error("--publish: got --quick too, expected the whole study; leave one out")
    try:
        python = environment.ensure()
        content = study(QUICK if options.quick else FULL, options.out, python, options.quick)
    except (ConfigError, DataError, environment.NoPython) as error:
        print(f"gap: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted; the same command goes on from what is in {options.out}")
        return 130
    for each in content["findings"]["conclusions"]:
        found = each["effect"]
        mark = {None: "", True: "holds", False: "DOES NOT HOLD"}[each["holds"]]
        print(f"{each['about']}: {each['text']} {found['mean']:+.3f} "
              f"[{found['low']:+.3f}, {found['high']:+.3f}]  {mark}")  # fmt: skip
    print(f"written: {options.out / 'gap.json'}, {options.out / 'report.html'}")
    if options.publish:
        publish(content, RESULTS / f"{options.publish}.json")
    elif not options.quick:
        differ = otherwise(content["findings"], _read(PUBLISHED)["findings"])
        print("\n".join(["unlike what is published:", *differ] if differ else [SAME]))
    return 0


def study(setting: Setting, out: Path, python: Path, quick: bool) -> dict[str, Any]:
    """Runs what is not yet there, and writes `gap.json` and `report.html`."""
    chosen = arms(setting, quick=quick)
    rate_of = {arm.name: arm.rate_of for arm in chosen}
    kept = _Kept(out / "runs", setting)
    (out / "logs").mkdir(parents=True, exist_ok=True)
    waiting: list[Future[list[Run]]] = []
    runs: list[Run] = []
    programs: Programs = {}

    def trained(what: str, arm: Arm) -> list[Run]:
        rate = Runs(runs, rate_of).rate(arm.rate_of) if arm.rate_of else None
        return kept(what, arm, "jaxfed", lambda: in_jaxfed(arm, setting, rate, programs))

    def reference(what: str, arm: Arm, seed: int, repeat: int, rate: float) -> list[Run]:
        return kept(
            f"{what}, seed {seed}.{repeat}", arm, f"reference-{seed}.{repeat}-{rate:g}",
            lambda: [in_reference(arm, setting, seed, repeat, rate, worker)],
        )  # fmt: skip

    # TFF has a lane of its own beside jaxfed's: neither keeps two cores busy by itself.
    with (
        Worker(python, out / "logs", run="tff_reference.training:run") as worker,
        ThreadPoolExecutor(1) as lane,
    ):
        try:
            for number, arm in enumerate(chosen, start=1):
                what = f"[{number}/{len(chosen)}] {arm.name}"
                runs += trained(what, arm)
                if arm.reference:
                    rate = Runs(runs, rate_of).rate(arm.name)
                    repeats = range(setting.repeats if arm.repeated else 1)
                    waiting += [
                        lane.submit(reference, what, arm, seed, repeat, rate)
                        for repeat, seed in itertools.product(repeats, setting.seeds)
                    ]
            for each in waiting:
                runs += each.result()
        except BaseException:
            lane.shutdown(wait=False, cancel_futures=True)
            worker.close()
            raise
    content = {
        "command": COMMAND + (" --quick" if quick else ""),
        "setting": setting._asdict(),
        "device": device_name(),
        "versions": _versions(runs),
        "seconds_of_runs": round(sum(run["seconds"] for run in runs), 1),
        "arms": {arm.name: _described(arm) for arm in chosen},
        "runs": runs,
        "findings": findings(Runs(runs, rate_of), rate_of, quick=quick),
    }
    write_json(out / "gap.json", content)
    write_atomically(out / "report.html", pages.report(content))
    return content


def publish(content: dict[str, Any], path: Path) -> None:
    """Writes what is committed: the study to `path`, and the pages anew."""
    docs = ROOT / "docs"
    write_json(path, content)
    content, again = _read(PUBLISHED), _read(AGAIN) if AGAIN.exists() else None
    for name, picture in pages.figures(content).items():
        write_atomically(docs / f"{name}.svg", picture)
    write_atomically(docs / "gap.md", pages.markdown(content, again))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    write_atomically(ROOT / "README.md", pages.in_readme(readme, content))


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


class _Kept:
    """Finished runs in files, so that none is repeated."""

    def __init__(self, folder: Path, setting: Setting):
        self._folder, self._setting = folder, setting

    def __call__(self, what: str, arm: Arm, name: str, make: Callable[[], list[Run]]) -> list[Run]:
        key = json.dumps([_described(arm), self._setting._asdict()], sort_keys=True)
        digest = hashlib.sha256(key.encode()).hexdigest()[:8]
        words = "".join(c if c.isalnum() or c in ".-" else "_" for c in f"{arm.name}-{name}")
        path = self._folder / f"{words}-{digest}.json"
        if path.exists():
            return json.loads(path.read_text())
        started = time.perf_counter()
        runs = make()
        write_json(path, runs)
        seconds = time.perf_counter() - started
        last = max(runs, key=lambda run: max(v[-1] for v in run["test"].values()))
        scores = ", ".join(f"{rule} {values[-1]:.3f}" for rule, values in last["test"].items())
        print(f"{what}: {last['system']}, {len(runs)} run(s), {seconds:.0f} s; "
              f"best at rate {last['rate']:g}: {scores}", flush=True)  # fmt: skip
        return runs


def _described(arm: Arm) -> dict[str, Any]:
    return {**arm._asdict(), "experiment": to_dict(arm.experiment)}


def _versions(runs: list[Run]) -> dict[str, str]:
    ours = {name: importlib.metadata.version(name) for name in ("jaxfed", "jax", "flax", "optax")}
    theirs = next(run.pop("versions") for run in runs if "versions" in run)
    for run in runs:
        run.pop("versions", None)
    return {**ours, **theirs}


if __name__ == "__main__":
    sys.exit(main())
