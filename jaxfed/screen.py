"""What the terminal shows: a header, a progress bar, a table."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from jaxfed.config import ClientConfig, ServerConfig
from jaxfed.core.batch_stats import POLICIES
from jaxfed.optimizers import OPTIMIZERS
from jaxfed.prepare import Task
from jaxfed.program import chunk_of
from jaxfed.run import device_name, name_of


def header(console: Console, task: Task, points: int = 1, programs: int = 1) -> None:
    """Says what is about to run, with nothing left implicit."""
    experiment, dataset = task.experiment, task.dataset
    sizes = task.partition.sizes
    config, client, server = experiment.data, experiment.client, experiment.server
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column(overflow="fold")

    def line(name: str, text: str) -> None:
        grid.add_row(name, Text(text))

    side = "x".join(map(str, dataset.x_train.shape[1:]))
    swept = f"  ({points} points, {programs} compiled)" if points > 1 else ""
    line("experiment", name_of(experiment) + swept)
    what = "images" if dataset.has_images else f"{dataset.x_train.dtype} examples"
    count = f"{len(dataset.y_train)} + {len(dataset.y_test)} {what}"
    classes = f", {dataset.num_classes} classes" if dataset.num_classes else ""
    line("data", f"{dataset.name}: {count}, {side}{classes}")
    for note in dataset.notes:
        line("", note)
    if experiment.task != "classification":
        line("task", str(experiment.task))
    clients = f"{len(sizes)} clients of {sizes.min()} to {sizes.max()} examples"
    line("partition", f"{config.partition}: {clients}, {len(task.partition.order)} in all")
    model = experiment.model
    width = f", width {model.width:g}" if model.width is not None else ""
    norm = f", norm {model.norm}" if model.norm else ""
    scaled = f", pixels {model.input_range}" if model.input_range not in (None, "0..1") else ""
    frozen = f", frozen {model.frozen}" if model.frozen else ""
    line("model", f"{model.name}{width}{norm}{scaled}{frozen}: {task.parameters:,} parameters")
    if task.start is not None:
        line("init", task.start.note)
    if policy := experiment.model.batch_stats:
        line("batch norm", f"{task.statistics:,} statistics, {policy}: {POLICIES[policy].summary}")
    mu = f", mu {client.mu:g}" if client.mu is not None else ""
    steps = (
        f"{client.epochs or 1} epoch(s), batch {task.schedule.batch}, {task.schedule.steps} steps"
    )
    trained = f"{optimizer_text(client)}{mu}, " if client.lr is not None else ""
    line("client", f"{trained}{steps}")
    if server.lr is not None:
        how = f"{server.aggregator} of messages, " if server.aggregator else ""
        weighted = f"weights by {experiment.weighting}" if experiment.weighting else ""
        line("server", f"{optimizer_text(server)}, {how}{weighted}".strip(", "))
    cohort = f"{experiment.clients_per_round} clients each"
    line(
        "rounds",
        f"{experiment.rounds} of {experiment.algorithm}, {cohort}, seed {experiment.seed}",
    )
    chunk = chunk_of(experiment)
    at_once = "all clients" if chunk is None else f"up to {chunk} client(s)"
    each = " on each device" if jax.device_count() > 1 else ""
    line("device", f"{device_name()}, {experiment.dtype}, {at_once} at once{each}")
    console.print(grid)


def optimizer_text(config: ClientConfig | ServerConfig) -> str:
    """An optimizer with all its numbers, defaults included."""
    spec = OPTIMIZERS[config.optimizer or "sgd"]
    given = {key: getattr(config, key) for key in ("weight_decay", *spec.defaults)}
    numbers = {key: spec.defaults.get(key) if v is None else v for key, v in given.items()}
    if isinstance(config, ClientConfig):
        numbers["clip"] = config.clip
    parts = [f"{config.optimizer or 'sgd'} lr {config.lr:g}"]
    parts += [f"{key.replace('_', ' ')} {v:g}" for key, v in numbers.items() if v is not None]
    if config.schedule not in (None, "constant"):
        decay = f" {config.lr_decay:g} per round" if config.lr_decay is not None else ""
        parts.append(f"{config.schedule}{decay}")
    if isinstance(config, ServerConfig) and config.warmup is not None:
        parts.append(f"warm-up {config.warmup} rounds")
    return ", ".join(parts)


@contextlib.contextmanager
def rounds_bar(
    console: Console, total: int
) -> Iterator[Callable[[int, dict[str, Any] | None], None]]:
    """A bar with rate and time left; without a terminal, a plain line at every evaluation.

    Gives a function of the rounds done and the newest row, or None while a program compiles.
    """
    if not console.is_terminal:

        def plain(done: int, row: dict[str, Any] | None) -> None:
            if row is None:
                console.print("compiling ...", highlight=False)
            elif row["test_loss"] is not None:
                console.print(f"{done}/{total}  {row_text(row)}", highlight=False)

        yield plain
        return
    columns = (
        TextColumn("rounds"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(), TextColumn("{task.fields[row]}"),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        job = bar.add_task("rounds", total=total, rate="", row="")

        def update(done: int, row: dict[str, Any] | None) -> None:
            rate = bar.tasks[0].speed
            shown = f"{rate:.2f} rounds/s" if rate else ""
            if row is None:
                bar.update(job, row="compiling ...")
            elif row["test_loss"] is not None:
                bar.update(job, row=row_text(row))
            bar.update(job, completed=done, rate=shown)

        yield update


def row_text(row: dict[str, Any]) -> str:
    """One round in one line."""
    dropped = f"  dropped {row['dropped_clients']}" if row["dropped_clients"] else ""
    names = [key.removeprefix("test_") for key in row if key.startswith("test_")]
    names = sorted(names, key=lambda name: (name == "loss", name))  # the loss is the last
    tested = "  ".join(
        f"test {name.replace('_', ' ')} {_figure(row[f'test_{name}'])}" for name in names
    )
    return f"round {row['round']}  {tested}  train loss {_figure(row['train_loss'])}{dropped}"


def _figure(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def results(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """The final table: one line a run."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for key in rows[0]:
        table.add_column(key.replace("_", " "), justify="left" if key == "name" else "right")
    for row in rows:
        table.add_row(*(f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)


@contextlib.contextmanager
def host_work(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for long work on the host, such as decoding a dataset; shown only if there is any."""
    if not console.is_terminal:
        said: set[str] = set()

        def plain(what: str, done: int, total: int) -> None:  # noqa: ARG001
            if what not in said:
                said.add(what)
                console.print(f"{what} ({total}) ...", highlight=False)

        yield plain
        return
    with Progress(console=console, transient=True) as bar:
        jobs: dict[str, Any] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in jobs:
                jobs[what] = bar.add_task(what, total=total)
            bar.update(jobs[what], completed=done)

        yield update
