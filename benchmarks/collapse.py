"""MobileNet's collapse and its cure: one network, one setting, one switch.

    JAXFED_DATA_DIR=... python -m benchmarks.collapse

writes `docs/results/collapse.json` and prints the table of `docs/batchnorm.md`.
"""

import json
import time
from pathlib import Path

from jaxfed import ClientConfig, DataConfig, Experiment, ModelConfig, run
from jaxfed.folder import write_json

OUT = Path(__file__).parent.parent / "docs" / "results" / "collapse.json"

ARMS = {
    "BatchNorm, `frozen` (TFF's rule)": ModelConfig(batch_stats="frozen"),
    "BatchNorm, `mean`": ModelConfig(batch_stats="mean"),
    "BatchNorm, `recalibrate`": ModelConfig(batch_stats="recalibrate"),
    "GroupNorm": ModelConfig(norm="group"),
}


def experiment(model: ModelConfig) -> Experiment:
    """10 IID clients of 300 MNIST images, all of them in every round."""
    return Experiment(
        rounds=15,
        eval_every=5,
        data=DataConfig(dataset="mnist", num_clients=10, examples_per_client=300),
        model=ModelConfig("mobilenet-v1", 0.25, model.norm, model.batch_stats),
        client=ClientConfig(optimizer="adam", lr=3e-3, epochs=4, batch_size=20),
    )


def main() -> None:
    started, runs = time.perf_counter(), []
    print("| MobileNetV1 0.25 with | round 5 | round 10 | round 15 |\n|---|---|---|---|")
    for label, model in ARMS.items():
        result = run(experiment(model))
        tested = {
            str(row["round"]): row["test_accuracy"]
            for row in result.history
            if row["test_accuracy"] is not None
        }
        runs.append({"label": label, "test_accuracy": tested, "summary": result.summary})
        print(f"| {label} | " + " | ".join(f"{v:.3f}" for v in tested.values()) + " |", flush=True)
    seconds = round(time.perf_counter() - started, 1)
    write_json(OUT, {"command": "python -m benchmarks.collapse", "seconds": seconds, "runs": runs})
    print(json.dumps({"seconds": seconds, "written": OUT.name}))


if __name__ == "__main__":
    main()
