"""The README's table: the worst error of every rung over all cases of the suite."""

import json
from pathlib import Path
from typing import Any

from parity_tests.measure import Rung
from parity_tests.suite import SUITE
from parity_tests.tolerances import LIMITS, NOISE_FACTOR, YOGI, tolerance

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results" / "parity.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- parity: begin -->", "<!-- parity: end -->"


def as_json(found: dict[str, tuple[str, list[Rung]]]) -> dict[str, Any]:
    """Results of the suite, `{case: (dtype, rungs)}`, as they are kept in RESULTS."""
    return {
        "command": "python -m parity_tests.record",
        "cases": {
            name: {
                "dtype": dtype,
                "rungs": {rung.name: {"error": rung.error, "noise": rung.noise} for rung in rungs},
            }
            for name, (dtype, rungs) in found.items()
        },
    }


def markdown(results: dict[str, Any]) -> str:
    """The table, a row a rung; without what is held against another limit than the rung's."""
    lines = [
        "| rung | worst, float64 | limit | worst, float32 | limit | why not zero |",
        "|---|---|---|---|---|---|",
    ]
    for name, limit in LIMITS.items():
        cells = [name]
        for dtype, allowed in (("float64", limit.float64), ("float32", limit.float32)):
            errors = [
                values["error"]
                for case, rung, values in comparisons(results)
                if results["cases"][case]["dtype"] == dtype and rung == name
                if values["noise"] is None and not by_yogi(case, rung)
            ]
            cells += [f"{max(errors):.0e}" if errors else "", f"{allowed:.0e}"]
        lines.append("| " + " | ".join([*cells, limit.why]) + " |")
    return "\n".join(lines)


def comparisons(results: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """All of them: `(case, rung, values)`."""
    return [
        (name, rung, values)
        for name, case in results["cases"].items()
        for rung, values in case["rungs"].items()
    ]


def by_yogi(case: str, rung: str) -> bool:
    """True where TFF's float32 step size decides."""
    experiment = SUITE[case].experiment
    return experiment.dtype == "float64" and tolerance(rung, experiment) == YOGI


def text(results: dict[str, Any]) -> str:
    """What stands in the README between BEGIN and END."""
    every = comparisons(results)
    yogi = [values["error"] for case, rung, values in every if by_yogi(case, rung)]
    noisy = [values for _, _, values in every if values["noise"] is not None]
    lines = [
        f"{len(results['cases'])} experiments, {len(every)} comparisons; largest relative "
        "difference between jaxfed and TFF:",
        "",
        markdown(results),
        "",
        f"Yogi is left out of the float64 columns: TFF computes its step size in float32, and the "
        f"{len(yogi)} comparisons that it takes part in are up to {max(yogi):.0e} apart "
        f"(limit {YOGI:.0e}).",
    ]
    if noisy:
        worst = max(values["error"] / values["noise"] for values in noisy)
        lines += [
            f"Ill-conditioned numbers (comparisons: {len(noisy)}) are left out too and held "
            "against their own noise, what changing every weight by one unit in the last place "
            f"does to jaxfed's result: at most {worst:.1f} times that (limit {NOISE_FACTOR:.0f}).",
        ]
    return "\n".join(lines)


def written(readme: str, table: str) -> str:
    """The README with the table put in."""
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def read() -> dict[str, Any]:
    """The kept results."""
    return json.loads(RESULTS.read_text())
