"""What the terminal shows: a header, a progress bar, a table."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from jaxfed.batch_stats import POLICIES
from jaxfed.experiment import ClientConfig, ServerConfig
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
    images = f"{len(dataset.y_train)} + {len(dataset.y_test)} images"
    line("data", f"{dataset.name}: {images}, {side}, {dataset.num_classes} classes")
    for note in dataset.notes:
        line("", note)
    clients = f"{len(sizes)} clients of {sizes.min()} to {sizes.max()} images"
    line("partition", f"{config.partition}: {clients}, {len(task.partition.order)} in all")
    network = f"{experiment.model.name}, width {experiment.model.width:g}"
    norm = f", norm {experiment.model.norm}" if experiment.model.norm else ""
    line("model", f"{network}{norm}: {task.parameters:,} parameters")
    if policy := experiment.model.batch_stats:
        line("batch norm", f"{task.statistics:,} statistics, {policy}: {POLICIES[policy]}")
    prox = f", mu {client.prox_mu:g}" if client.prox_mu is not None else ""
    steps = f"{client.epochs} epoch(s), batch {task.schedule.batch}, {task.schedule.steps} steps"
    line("client", f"{_optimizer(client)}{prox}, {steps}")
    if experiment.algorithm != "central":
        line("server", f"{_optimizer(server)}, weights by {experiment.weighting}")
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


def _optimizer(config: ClientConfig | ServerConfig) -> str:
    momentum = f", momentum {config.momentum:g}" if config.momentum is not None else ""
    return f"{config.optimizer} lr {config.lr:g}{momentum}"


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
            elif row["test_accuracy"] is not None:
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
            elif row["test_accuracy"] is not None:
                bar.update(job, row=row_text(row))
            bar.update(job, completed=done, rate=shown)

        yield update


def row_text(row: dict[str, Any]) -> str:
    """One round in one line."""
    dropped = f"  dropped {row['dropped_clients']}" if row["dropped_clients"] else ""
    return (
        f"round {row['round']}  test accuracy {_figure(row['test_accuracy'])}  "
        f"test loss {_figure(row['test_loss'])}  train loss {_figure(row['train_loss'])}{dropped}"
    )


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
