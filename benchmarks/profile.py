"""Where a round's time goes: XLA's operations, the longest first.

    python -m benchmarks.profile [MODEL ...] [--rows N] [--write]

Ten clients of 100 images, five steps of 20, one client after another on one core, as XLA for CPU
runs them. `us` is one execution of the operation, `share` its part of the time of all operations.
`--write` makes `benchmarks/results/profile.json`.
"""

import argparse
import gzip
import json
import os
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
OUT = ROOT / "benchmarks" / "results" / "profile.json"
MODELS = {"cnn": (28, 1.0), "mlp": (28, 1.0), "mobilenet-v1": (32, 0.25)}
"""Side of the images, and width."""
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profile", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--rows", type=int, default=15, help="operations a model (default: 15)")
    parser.add_argument("--write", action="store_true", help="write the results file")
    options = parser.parse_args()
    if unknown := set(options.models) - set(MODELS):
        parser.error(f"got {', '.join(sorted(unknown))}, expected some of {', '.join(MODELS)}")
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", "1")
    if hasattr(os, "sched_setaffinity"):  # the operations of one core, not of threads that wait
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    found = {}
    for model in options.models or MODELS:
        found[model] = profile(model)
        print(f"\n{model}\n   share       us  calls  operation")
        for row in found[model][: options.rows]:
            print(f"{row['share']:8.1%} {row['us']:8.1f} {row['calls']:6d}  {row['operation']}")
    if options.write:
        from benchmarks.results_file import stamp
        from jaxfed.folder import write_json

        models = {model: rows[: options.rows] for model, rows in found.items()}
        write_json(OUT, {**stamp("python -m benchmarks.profile --write"), "models": models})
        print(f"written: {OUT.relative_to(ROOT)}")


def profile(model: str) -> list[dict[str, Any]]:
    """Runs a few rounds under JAX's profiler: a row an operation, the longest in all first."""
    import jax

    from jaxfed import Experiment
    from jaxfed.config import override
    from jaxfed.data import fit, load
    from jaxfed.plan import make_plan, stack_plans
    from jaxfed.prepare import prepare
    from jaxfed.program import compile_tasks

    side, width = MODELS[model]
    experiment = override(
        Experiment(),
        {"rounds": ROUNDS, "eval_every": ROUNDS, "data.num_clients": 10,
         "data.examples_per_client": 100, "client.epochs": 1, "client.batch_size": 20,
         "client.lr": 0.01, "model.name": model, "model.width": width},
    )  # fmt: skip
    task = prepare(experiment, dataset=fit(load("digits"), side, side))
    program = compile_tasks([task])
    plans = [make_plan(task.schedule, number) for number in range(1, ROUNDS + 1)]
    inputs = program.numbers, program.state, program.train_set, stack_plans([stack_plans(plans)])
    jax.block_until_ready(program.train(*inputs))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            jax.block_until_ready(program.train(*inputs))
        (file,) = Path(folder).rglob("perfetto_trace.json.gz")
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return rows_of(events, program.train.as_text())


def rows_of(events: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """The operations of a compiled program `text` in a trace; loops are left out: they hold others.

    An operation is described by its shape and what it was in the source.
    """
    lines = dict(re.findall(r"%(\S+) = ([^\n]+)", text))
    spent, calls = Counter[str](), Counter[str]()
    for event in events:
        name = event.get("name", "")
        if event.get("ph") == "X" and name in lines and " while(" not in lines[name]:
            spent[name] += event["dur"]
            calls[name] += 1
    total = sum(spent.values())
    return [
        {
            "operation": described(name, lines[name]),
            "calls": calls[name],
            "us": time / calls[name],
            "share": time / total,
        }
        for name, time in spent.most_common()
    ]


def described(name: str, line: str) -> str:
    """For example `dot f32[288,64] transpose/dot_general`."""
    shape = re.match(r"\(?\w+\[[\d,]*\]", line)
    source = re.search(r'op_name="([^"]*)"', line)
    tail = "/".join(source[1].split("/")[-2:]) if source else ""
    return (
        f"{name.split('.', maxsplit=1)[0]} {shape[0].lstrip('(') if shape else ''} {tail}".strip()
    )


if __name__ == "__main__":
    main()
