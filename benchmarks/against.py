"""This checkout and another one on random experiments: do they train the same networks?

    python -m benchmarks.against CHECKOUT [--count 40] [--seed 0]

draws experiments on digits in float64, runs each in both checkouts, and compares final weights and
statistics, and every loss and accuracy. `difference` is the largest of any array, relative to its
largest number, or to 1 where that is larger. Exit code 1 if one is above 1e-10.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
LIMIT = 1e-10
"""Sums in another order are 1e-16 apart, and two rounds multiply that; a fault is far above."""

RATES = {
    "sgd": (0.05, 1.0), "momentum": (0.02, 0.5), "nesterov": (0.02, 0.5), "adagrad": (0.03, 0.1),
    "adam": (0.003, 0.01), "adamw": (0.003, 0.01), "rmsprop": (0.003, 0.01), "yogi": (0.003, 0.01),
}  # fmt: skip
"""Learning rates of clients and of the server."""
# A bias in front of BatchNorm has a gradient of exactly zero and a computed one of rounding errors,
# which an optimizer that divides by the gradient's size makes into steps: Adam and its like.
BATCHNORM = ("sgd", "momentum", "nesterov", "adagrad")
DEVICES = (1, 2, 4)

SCRIPT = """
import sys
from pathlib import Path
import jax
import numpy as np
import jaxfed
if not Path(jaxfed.__file__).is_relative_to(Path.cwd()):
    sys.exit(f"got jaxfed from {jaxfed.__file__}, expected {Path.cwd()}")
out, *paths = map(Path, sys.argv[1:])
for path in paths:
    result = jaxfed.run(jaxfed.from_json(path))
    leaves = jax.tree_util.tree_leaves_with_path(result.variables)
    arrays = {jax.tree_util.keystr(name): np.asarray(leaf) for name, leaf in leaves}
    for key in ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "delta_norm"):
        arrays[key] = np.array([row[key] for row in result.history], float)
    np.savez(out / f"{path.stem}.npz", **arrays)
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.against", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("checkout", type=Path, help="another checkout of jaxfed")
    parser.add_argument("--count", type=int, default=40, help="experiments (default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    options = parser.parse_args()
    other = options.checkout.resolve()
    if not (other / "jaxfed" / "__init__.py").is_file():
        parser.error(f"CHECKOUT: got {other}, expected a folder with jaxfed in it")
    draw = random.Random(options.seed)
    drawn = [(experiment(draw), draw.choice(DEVICES)) for _ in range(options.count)]
    apart = []
    with tempfile.TemporaryDirectory() as name:
        ours = computed(ROOT, drawn, Path(name) / "ours")
        theirs = computed(other, drawn, Path(name) / "theirs")
        print("devices  difference  experiment")
        for number, (config, devices) in enumerate(drawn):
            apart.append(difference(ours / f"{number}.npz", theirs / f"{number}.npz"))
            print(f"{devices:7d} {apart[-1]:11.1e}  {described(config)}", flush=True)
    largest = max(apart, default=0.0)
    print(f"{len(apart)} experiments; largest relative difference: {largest:.1e}")
    return 0 if largest <= LIMIT else 1


def experiment(draw: random.Random) -> dict[str, Any]:
    """A random experiment as JSON; nothing is given that its algorithm does not use."""
    algorithm = draw.choice(["fedavg", "fedavg", "fedprox", "fedsgd", "central"])
    clients = draw.randint(4, 6)
    partition = draw.choice(["iid", "shards", "dirichlet", "quantity"])
    data: dict[str, Any] = {
        "partition": partition, "num_clients": clients, "examples_per_client": draw.randint(12, 30)
    }  # fmt: skip
    if partition in ("dirichlet", "quantity"):
        data["alpha"] = draw.choice([0.3, 1.0])
    networks = ["cnn-small"] * 4 + ["cnn-dropout", "mlp", "logistic"]
    model: dict[str, Any] = {"name": draw.choice(networks)}
    if model["name"] != "logistic":
        model["width"] = 0.25
    names = tuple(RATES)
    if model["name"] == "cnn-small":
        rules = ["frozen", "mean", "pooled", "recalibrate"]
        rules += ["local"] * 2 if algorithm in ("fedavg", "fedprox") else []
        model |= {"norm": "batch", "batch_stats": draw.choice(rules)}
        names = BATCHNORM

    def step(place: int) -> dict[str, Any]:
        name = draw.choice(names)
        given: dict[str, Any] = {"optimizer": name, "lr": RATES[name][place]}
        if name in ("momentum", "nesterov") and draw.random() < 0.5:
            given["momentum"] = 0.7
        return given

    batch = draw.choice([5, 8, 20, None])
    client: dict[str, Any] = {"batch_size": batch, "shuffle": draw.random() < 0.8}
    if algorithm != "fedsgd":
        client |= {"epochs": draw.randint(1, 2), **step(0)}
    if algorithm == "fedprox":
        client["prox_mu"] = draw.choice([0.1, 1.0])
    config = {
        "seed": draw.randint(0, 99), "rounds": 2, "eval_every": draw.randint(1, 2),
        "clients_per_round": draw.choice([clients, clients, clients - 1]), "dtype": "float64",
        "algorithm": algorithm, "parallel": draw.choice(["loop", "vmap", 2]),
        "data": data, "model": model, "client": client,
    }  # fmt: skip
    if algorithm == "central":
        return config
    return config | {"weighting": draw.choice(["examples", "uniform"]), "server": step(1)}


def computed(checkout: Path, drawn: list[tuple[dict[str, Any], int]], out: Path) -> Path:
    """The folder of what a checkout makes of the experiments, a process for each device count."""
    out.mkdir(parents=True)
    for devices in DEVICES:
        paths = []
        for number, (config, count) in enumerate(drawn):
            if count == devices:
                paths.append(out / f"{number}.json")
                paths[-1].write_text(json.dumps(config))
        quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PLATFORMS": "cpu"}
        subprocess.run(
            [sys.executable, "-c", SCRIPT, out, *paths], check=True, cwd=checkout,
            env={**os.environ, **quick, "JAX_NUM_CPU_DEVICES": str(devices),
                 "PYTHONPATH": str(checkout)},
        )  # fmt: skip
    return out


def difference(one: Path, other: Path) -> float:
    """The largest relative difference of two files of arrays; infinite where they are not alike."""
    with np.load(one) as ours, np.load(other) as theirs:
        if set(ours) != set(theirs):
            return float("inf")
        return max(_apart(ours[name], theirs[name]) for name in ours)


def _apart(a: np.ndarray, b: np.ndarray) -> float:
    if a.shape != b.shape or (np.isfinite(a) != np.isfinite(b)).any():
        return float("inf")
    return float(np.nanmax(np.abs(a - b), initial=0) / np.nanmax(np.abs(b), initial=1))


def described(config: dict[str, Any]) -> str:
    """What sets an experiment apart, on one line."""
    model, client, server = config["model"], config["client"], config.get("server", {})
    words = [
        config["algorithm"], model["name"], model.get("batch_stats"), config["data"]["partition"],
        client.get("optimizer"), server.get("optimizer"), config.get("weighting"),
        f"batches of {client['batch_size'] or 'all'}", f"parallel {config['parallel']}",
    ]  # fmt: skip
    return ", ".join(word for word in words if word)


if __name__ == "__main__":
    sys.exit(main())
