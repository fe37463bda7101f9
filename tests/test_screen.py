"""What the terminal shows: help, lists, progress."""

import io
import os
import pty
import re
import subprocess
import sys
from typing import get_args

import pytest
from rich.console import Console

from jaxfed import manual, screen
from jaxfed.aggregators import AGGREGATORS
from jaxfed.algorithms import ALGORITHMS
from jaxfed.config import BatchStats, Experiment, dotted_keys, value_of
from jaxfed.core.batch_stats import POLICIES
from jaxfed.data import PARTITIONS
from jaxfed.data.tfds import COMMON
from jaxfed.models import MODELS
from jaxfed.optimizers import OPTIMIZERS
from jaxfed.tasks import TASKS
from jaxfed.train import Command, main

QUICK = ["--model.name", "logistic", "--rounds", "3", "--client.epochs", "1"]


def groups_of(text):
    """The lines of each group, a wrapped one joined again."""
    groups = {}
    for block in text.strip().split("\n\n"):
        title, *lines = block.splitlines()
        groups[title.partition(":")[0]] = re.sub(r"\n {6,}", " ", "\n".join(lines)).splitlines()
    return groups


def test_help_has_every_flag_once_in_its_group_with_its_default():
    groups = groups_of(manual.help_text(Command(), 80))
    names = ["experiment", "data", "model", "client", "server", "output"]
    assert list(groups)[-6:] == names
    base = Experiment()
    for key in dotted_keys():
        group, _, _ = key.rpartition(".")
        (line,) = [row for row in groups[group or "experiment"] if row.split()[0] == f"--{key}"]
        value = value_of(base, key)
        if value not in (None, ""):
            assert line.split()[1] == str(value)
            assert "default" not in line  # said once
        assert re.search(r"\S\s{2,}\S.{8}", line), line  # what it is for
    for flag in ("--out", "--resume", "--checkpoint_every", "--labels", "--list", "--quiet"):
        assert sum(row.split()[0] == flag for row in groups["output"]) == 1
    lines = [row for row in manual.help_text(Command(), 80).splitlines() if row.startswith(" ")]
    assert max(map(len, lines)) <= 80


def test_help_names_what_a_flag_takes():
    text = " ".join(manual.help_text(Command(), 10_000).split())
    for name in (
        *PARTITIONS,
        *OPTIMIZERS,
        *ALGORITHMS,
        *AGGREGATORS,
        *TASKS,
        *get_args(BatchStats),
    ):
        assert re.search(rf"[ \[]{name}[,.\] ]", text), name
    (parallel,) = [
        line for line in manual.help_text(Command(), 10_000).splitlines() if "--parallel" in line
    ]
    assert "each device" in parallel
    assert "all visible devices are used" in parallel


def test_list_names_everything_there_is(capsys):
    assert main(["--list"]) == 0
    groups = groups_of(capsys.readouterr().out)
    expected = {
        "datasets": ("digits", *COMMON),
        "partitions": PARTITIONS,
        "models": MODELS,
        "BatchNorm's statistics": get_args(BatchStats),
        "optimizers": OPTIMIZERS,
        "tasks": TASKS,
        "algorithms": ALGORITHMS,
        "aggregators": AGGREGATORS,
    }
    assert list(groups) == list(expected)
    for title, names in expected.items():
        told = {line.split()[0]: line.split()[1:] for line in groups[title]}
        assert set(names) <= set(told)
        assert all(told.values())  # each with a few words
    assert set(POLICIES) == set(get_args(BatchStats))


def test_help_loads_nothing_that_it_does_not_need():
    code = (
        "import sys; from jaxfed.train import main; assert main(['--help']) == 0;"
        "slow = {'matplotlib', 'sklearn', 'tensorboardX', 'tensorflow', 'tensorflow_datasets'};"
        "sys.exit(' '.join(slow & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def row(number, accuracy):
    return {
        "round": number, "train_loss": 1.5, "test_loss": None if accuracy is None else 0.5,
        "test_accuracy": accuracy, "dropped_clients": 0,
    }  # fmt: skip


@pytest.mark.parametrize("terminal", [True, False])
def test_progress(terminal):
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=120, color_system=None)
    with screen.rounds_bar(console, 4) as update:
        update(0, None)
        for number in range(1, 5):
            update(number, row(number, number / 10 if number % 2 == 0 else None))
    text = file.getvalue()
    if terminal:
        for word in ("4/4", "rounds/s", "0:00:0", "test accuracy 0.4000"):
            assert word in text
        return
    assert "\x1b" not in text
    lines = text.splitlines()
    assert [line[:3] for line in lines] == ["com", "2/4", "4/4"]
    assert "test accuracy 0.2000" in lines[1]


def test_quiet_prints_nothing(capfd):
    assert main([*QUICK, "--quiet"]) == 0
    assert capfd.readouterr() == ("", "")


def in_terminal(environment):
    """Everything that a run prints when it is started in a terminal."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "jaxfed.train", *QUICK]
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    parts = []
    try:
        while part := os.read(ours, 4096):
            parts.append(part)
    except OSError:  # Linux's way to say that the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    return b"".join(parts).decode()


def test_no_color_is_respected():
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"}
    environment.pop("NO_COLOR", None)
    color = re.compile(r"\x1b\[[\d;]*(3[0-7]|9[0-7]|38;5)[\d;]*m")
    assert color.search(in_terminal(environment))
    plain = in_terminal(environment | {"NO_COLOR": "1"})
    assert not color.search(plain)
    assert "3/3" in plain
