"""The pages, opened in a real browser (Debian's `chromium`), and what they say."""

import html
import re
import shlex
import shutil
import subprocess

import numpy as np
import pytest

from jaxfed import load_run, report
from jaxfed.config import override
from jaxfed.report.charts import MOST_POINTS, Series, line_chart, ticks
from jaxfed.report.of_run import worst
from jaxfed.train import main, parse

EVIL = "<script>alert(1)</script>"
QUICK = ["--model.name", "logistic", "--client.epochs", "1", "--quiet", "--name", EVIL]
SKEWED = ["--data.partition", "dirichlet", "--data.num_clients", "12", "--clients_per_round", "5"]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
in_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "run"
    assert main([*QUICK, *SKEWED, "--rounds", "6", "--eval_every", "2", "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def sweep_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep") / "sweep"
    axes = ["client.lr=0.5,0.01,0.1", "server.lr=0.5,1.0", "seed=0,1"]
    flags = [word for axis in axes for word in ("--sweep", axis)]
    assert main([*QUICK, "--rounds", "3", *flags, "--out", str(path)]) == 0
    return path


@pytest.fixture(params=["run", "sweep"])
def page(request):
    return (request.getfixturevalue(f"{request.param}_folder") / "report.html").read_text()


def test_a_page_is_one_file_that_asks_for_nothing(page):
    assert not re.search(r"\b(src|href|action|data)\s*=|url\(|@import|<link|<iframe", page, re.I)
    assert "default-src 'none'" in page
    assert EVIL not in page
    assert html.escape(EVIL) in page


def test_the_page_of_a_run_says_what_happened(run_folder):
    run, page = load_run(run_folder), (run_folder / "report.html").read_text()
    assert f"{100 * run.summary['final_test_accuracy']:.1f} %" in page
    accuracies = np.array([row["accuracy"] for row in run.clients])
    assert f"{100 * worst(accuracies):.1f}".removesuffix(".0") + " %" in page
    assert "no BatchNorm in this network" in page
    for name, version in run.summary["versions"].items():
        assert f"{name} {version}" in page
    # The curves have the numbers of the files.
    for row in run.history:
        value = f"{100 * row['train_accuracy']:.1f}".removesuffix(".0")
        assert f"train, on clients, round {row['round']}: {value} %" in page
    drawn = re.findall(r"<title>test, round (\d+): [\d.]+ %", page)
    assert drawn == ["2", "4", "6"]
    for row in run.clients:
        for label in range(10):
            count = row[f"class_{label}"]
            said = f"client {row['client']}: {count} image(s) of class {label}<"
            assert (said in page) == (count > 0)


def test_the_page_can_be_made_again_from_the_folder(run_folder):
    assert report.run_page(load_run(run_folder)) == (run_folder / "report.html").read_text()


def test_a_resumed_run_gives_the_same_page(run_folder, tmp_path):
    flags = [*QUICK, *SKEWED, "--eval_every", "2", "--out", str(tmp_path / "b")]
    assert main([*flags, "--rounds", "4"]) == 0
    assert main([*flags, "--rounds", "6", "--resume"]) == 0
    whole, resumed = load_run(run_folder), load_run(tmp_path / "b")
    again = resumed._replace(summary=whole.summary)  # seconds are of their own run
    assert report.run_page(again) == report.run_page(whole)


def experiment_of(page):
    """What the command in a page asks for."""
    (command,) = re.findall(r"<pre>(python .*?)</pre>", page, re.DOTALL)
    words = shlex.split(html.unescape(command).replace("\\\n", ""))
    assert words[:3] == ["python", "-m", "jaxfed.train"]
    return parse(words[3:]).experiment


def test_the_commands_of_a_page_give_the_experiment_again(run_folder, sweep_folder):
    page = (run_folder / "report.html").read_text()
    assert experiment_of(page) == load_run(run_folder).experiment
    runs = [load_run(path.parent) for path in sweep_folder.glob("*/summary.json")]
    best = max(runs, key=lambda run: run.summary["final_test_accuracy"])
    found = experiment_of((sweep_folder / "report.html").read_text())
    twins = [run for run in runs if run.summary["final_test_accuracy"]
             == best.summary["final_test_accuracy"]]  # fmt: skip
    assert found in [run.experiment for run in twins]


def test_the_heat_map_of_a_sweep_has_the_means_over_seeds(sweep_folder):
    runs = [load_run(path.parent) for path in sweep_folder.glob("*/summary.json")]
    cells = re.findall(r'<td style="--heat:[\d.]+">([\d.]+ %)</td>',
                       (sweep_folder / "report.html").read_text())  # fmt: skip
    expected = [
        np.mean([
            run.summary["final_test_accuracy"] for run in runs
            if (run.experiment.client.lr, run.experiment.server.lr) == (client, server)
        ])
        for client in (0.5, 0.01, 0.1) for server in (0.5, 1.0)
    ]  # fmt: skip
    assert cells == [f"{100 * v:.1f}".removesuffix(".0") + " %" for v in expected]


def test_values_that_are_not_finite_leave_gaps(tmp_path):
    chart = line_chart("c", [Series("a", [1, 2, 3], [None, 0.5, float("nan")])])
    assert chart.count("<circle") == 1
    assert "nan" not in chart.lower()
    assert "Nothing to draw" in line_chart("c", [Series("a", [1], [None])])
    out = tmp_path / "diverged"
    flags = ["--rounds", "3", "--server.lr", "1e38", "--out", str(out)]
    assert main([*QUICK, *flags]) == 1
    page = (out / "report.html").read_text()
    assert not re.search(r"\bnan\b|\binf\b", page)


def test_what_cannot_be_shown_is_said(run_folder):
    run = load_run(run_folder)
    many = [{**run.clients[0], "client": k} for k in range(200)]
    many[0]["accuracy"] = None
    page = report.run_page(run._replace(clients=many))
    assert "the first 50 of 200 clients" in page
    assert "1 client(s) without examples or training left out" in page
    central = override(run.experiment, {"algorithm": "central", "model.batch_stats": "mean"})
    page = report.run_page(run._replace(experiment=central))
    assert "Agreement" not in page
    assert "mean: weighted mean of the clients" in page
    local = override(run.experiment, {"model.batch_stats": "local"})
    assert "Accuracy of each client&#x27;s own network" in report.run_page(
        run._replace(experiment=local)
    )
    dropped = [{**row, "dropped_clients": 2 * (row["round"] == 3)} for row in run.history]
    page = report.run_page(run._replace(history=dropped))
    assert "2 client update(s) were not finite" in page
    assert "round 3 (2)" in page


def test_long_runs_keep_their_last_point():
    rounds = list(range(1, 5001))
    chart = line_chart("c", [Series("a", rounds, [x / 5000 for x in rounds])])
    points = re.findall(r'points="([^"]*)"', chart)[0].split()
    assert len(points) <= MOST_POINTS
    assert points[-1].startswith("342.0,")


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.93, 0.94), (5, 5), (-3, 1e6), (1e-8, 2e-8)])
def test_ticks_are_round_and_span_the_values(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 8
    assert found[0] <= low
    assert found[-1] >= high


def in_frame(page, script, width=390):
    """A page that shows another in a frame as wide as a phone: no window gets that narrow."""
    inner = page.replace("</body>", f"<script>{script}</script></body>")
    return (
        f'<body style="margin:0"><iframe style="border:0;width:{width}px;height:5000px" '
        f'srcdoc="{html.escape(inner)}"></iframe></body>'
    )


def browse(path, *flags, width=1280, height=2000):
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
        f"--user-data-dir={path.parent}/profile", f"--window-size={width},{height}",
        "--hide-scrollbars", "--virtual-time-budget=2000", *flags, path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


def told(dom):
    return html.unescape(re.findall(r'<body[^>]* data-told="([^"]*)"', dom)[0])


DARK = "--blink-settings=preferredColorScheme=0"


@in_browser
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_a_page_fits_a_phone_in_light_and_dark(page, width, dark, tmp_path):
    path = tmp_path / "page.html"
    script = (
        "const root = document.documentElement, style = getComputedStyle(document.body);"
        "const svg = document.querySelector('svg text').getBoundingClientRect();"
        "parent.document.body.dataset.told = [innerWidth, root.scrollWidth, svg.height,"
        " style.backgroundColor.match(/\\d+/), style.color.match(/\\d+/)].join(' ')"
    )
    path.write_text(in_frame(page, script, width))
    flags = [DARK] if dark else []
    inner, needed, letters, back, ink = map(float, told(browse(path, "--dump-dom", *flags)).split())
    assert inner == width
    assert needed <= width
    assert letters >= 9  # pixels
    assert (back < 60 and ink > 190) if dark else (back > 190 and ink < 60)
    shot = tmp_path / "shot.png"
    browse(path, f"--screenshot={shot}", *flags, width=max(width, 500))
    assert shot.stat().st_size > 20_000  # a blank one has a tenth of that


@in_browser
def test_a_sweep_is_sorted_by_a_click(sweep_folder, tmp_path):
    page = (sweep_folder / "report.html").read_text()
    script = (
        "const column = n => [...document.querySelectorAll('.sortable tbody tr')]"
        ".map(row => row.cells[n].textContent).join(' ');"
        "const click = n => document.querySelectorAll('.sortable th button')[n].click();"
        "const seen = [column(4)]; click(4); seen.push(column(4)); click(4); seen.push(column(4));"
        "click(1); seen.push(column(1));"
        "parent.document.body.dataset.told = seen.join('|')"
    )
    path = tmp_path / "page.html"
    path.write_text(in_frame(page, script, 1280))
    parts = told(browse(path, "--dump-dom")).split("|")
    before, down, up, rates = ([float(word) for word in part.split()] for part in parts)
    assert len(before) == 12
    assert down == sorted(before, reverse=True)
    assert up == sorted(before)
    assert before not in (up, down)
    assert rates == sorted(rates, reverse=True)
    assert set(rates) == {0.01, 0.1, 0.5}
