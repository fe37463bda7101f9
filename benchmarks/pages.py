"""The tables of README.md and benchmarks/README.md, made from the results files.

    python -m benchmarks.pages

`tests/test_benchmark_pages.py` holds the pages to what this makes.
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.peers.jobs import FLOWER
from jaxfed.folder import write_atomically

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
NAMES = {
    "jaxfed": "jaxfed", "tff": "TFF", "fedjax": "FedJAX", "torch": "PyTorch, a loop",
    "flower": "Flower, simulation", "pfl": "pfl",
}  # fmt: skip
ROUNDS = {
    "cnn": "CNN, 28x28", "mobilenet": "MobileNetV1 0.25, 32x32", "2nn": "2NN, 28x28",
}  # fmt: skip
"""The jobs of the README's table."""
Row = dict[str, Any]


def main() -> None:
    for page in PAGES:
        write_atomically(page, filled(page.read_text(encoding="utf-8")))
        print(f"written: {page.relative_to(ROOT)}")


def filled(text: str) -> str:
    """The page with every table between its marks made anew."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if begin in text:
            before, _, rest = text.partition(begin)
            text = f"{before}{begin}\n{table()}\n{end}{rest.partition(end)[2]}"
    return text


def results(name: str) -> dict[str, Any]:
    """A results file."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(head: list[str], rows: list[list[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def made(content: dict[str, Any]) -> str:
    """Command, machine, date."""
    return (
        f"`{content['command']}`, {content['cores']} cores ({content['processor']}), "
        f"{content['date']}."
    )


def milliseconds(seconds: float) -> str:
    """For example `8.35 ms`."""
    return f"{digits(1000 * seconds)} ms"


def digits(value: float) -> str:
    """Three digits, or those before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def overview() -> str:
    """A line a job, a column a peer: ms of a round, and how often jaxfed's goes into it."""
    content = results("peers")
    peers = [name for name in NAMES if any(row["peer"] == name for row in content["rows"])]
    rows = []
    for job, title in ROUNDS.items():
        cells = [title]
        for peer in peers:
            at = job + FLOWER if peer == "flower" else job
            found = [r for r in content["rows"] if (r["job"], r["peer"]) == (at, peer)]
            if not found or found[0]["absent"]:
                cells.append("n/a")
                continue
            time = milliseconds(found[0]["median_seconds"])
            cells.append(time if peer == "jaxfed" else f"{time} ({found[0]['ratio']:.1f}x)")
        rows.append(cells)
    of = content["versions"]
    repeats = min(len(row["timings"]) for row in content["rows"] if row["job"] in ROUNDS
                  and not row["absent"])  # fmt: skip
    versions = ", ".join(
        f"{package} {of[peer][package]}"
        for peer, package in (
            ("tff", "tensorflow-federated"), ("fedjax", "fedjax"), ("torch", "torch"),
            ("flower", "flwr"), ("pfl", "pfl"),
        )
        if peer in of and package in of[peer]
    )  # fmt: skip
    return (
        table(["one round", *(NAMES[peer] for peer in peers)], rows)
        + f"\n\nMedian of {repeats}; {made(content)} {versions}."
    )


def every_peer() -> str:
    """All lines of the comparison."""
    content = results("peers")
    head = ["job", "in", "median", "least to most", "a client", "peak memory", "times jaxfed"]
    rows = []
    for row in content["rows"]:
        name = NAMES[row["peer"]] + (f": {row['variant']}" if row["variant"] else "")
        if row["absent"]:
            rows.append([row["job"], name, row["absent"], "", "", "", ""])
            continue
        each = row["seconds_a_client"]
        rows.append(
            [
                row["job"],
                name,
                milliseconds(row["median_seconds"]),
                f"{milliseconds(row['least_seconds'])} to {milliseconds(row['most_seconds'])}",
                "" if each is None else milliseconds(each),
                f"{row['peak_bytes'] / 2**20:.0f} MiB",
                f"{row['ratio']:.2f}",
            ]
        )
    return table(head, rows) + f"\n\n{made(content)}"


def at_once() -> str:
    """ms of a round by the number of clients that are computed at once, on one device."""
    content = results("cpu")
    rows: dict[str, dict[str, float]] = {}
    for row in content["sections"]["jobs"]:
        if "ms" in row and "parallel" in row:
            job = f"{row['job']}, {row['clients']} clients"
            rows.setdefault(job, {})[row["parallel"] or "ms"] = row["ms"]
    columns = list(dict.fromkeys(name for times in rows.values() for name in times))
    lines = [
        [job, *(digits(times[name]) if name in times else "" for name in columns)]
        for job, times in rows.items()
    ]
    return table(["ms of a round", *columns], lines) + f"\n\n{of_device(content)}"


def of_device(content: dict[str, Any]) -> str:
    """Command, machine, date, of a file that `benchmarks.gpu` wrote."""
    return f"`{content['command']}`, {content['device']}, {content['host']}, {content['date']}."


def lowerings() -> str:
    """ms of one layer's step for all clients, float32, by lowering."""
    content = results("cpu")
    rows: dict[tuple[str, int], dict[str, float]] = {}
    for row in content["sections"]["lowerings"]:
        if row.get("precision") == "float32" and row["batch"] == 20 and "ms" in row:
            rows.setdefault((row["layer"], row["clients"]), {})[row["lowering"]] = row["ms"]
    head = ["layer", "clients", "`lax.conv`: grouped", "one by one", "ours: `vmap`", "one by one"]
    lines = []
    for (layer, clients), times in rows.items():
        ours = next(name for name in times if name in ("patches", "shifts"))
        names = ("grouped", "sequential", ours, f"{ours}, sequential")
        lines.append(
            [layer, str(clients), *(digits(times[n]) if n in times else "" for n in names)]
        )
    return table(head, lines) + f"\n\n{of_device(content)}"


def precision() -> str:
    """What the CNN has learnt in each precision."""
    content = results("precision")
    lines = [
        [
            row["precision"],
            str(row["rounds"]),
            *(f"{row[name]:.4f}" for name in ("train_loss", "test_loss", "test_accuracy")),
        ]
        for row in content["sections"]["precision"]
    ]
    head = ["products in", "rounds", "training loss", "test loss", "test accuracy"]
    return table(head, lines) + f"\n\n{of_device(content)}"


def operations() -> str:
    """The longest operations of a round, a table a network."""
    content, parts = results("profile"), []
    for model, rows in content["models"].items():
        lines = [
            [f"`{row['operation']}`", f"{row['us']:.3g}", f"{row['share']:.1%}"] for row in rows[:7]
        ]
        parts.append(table([model, "us each", "of the round"], lines))
    return "\n\n".join([*parts, made(content)])


TABLES = {
    "peers": overview,
    "every peer": every_peer,
    "at once": at_once,
    "lowerings": lowerings,
    "precision": precision,
    "operations": operations,
}


if __name__ == "__main__":
    main()
