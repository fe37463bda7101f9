"""Runs survive: damaged files, processes that are killed, two at once, a full disk."""

import csv
import errno
import json
import os
import resource
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfed.train
from benchmarks.survive import survive
from jaxfed import checkpoint, folder
from jaxfed.config import ConfigError
from jaxfed.train import main

# --- Checkpoints ----------------------------------------------------------------------------


def tree_of(number):
    return {
        "weights": jnp.arange(6, dtype=jnp.float32).reshape(2, 3) * number / 3,
        "half": jnp.asarray([0.1, -2.5, jnp.inf], jnp.bfloat16),
        "count": jnp.asarray(number, jnp.int32),
        "flag": jnp.asarray([True, False]),
        "key": jax.random.split(jax.random.key(number), 2),
        "none": None,
    }


def bits(tree):
    def of_leaf(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return str(jax.random.key_impl(leaf)), of_leaf(jax.random.key_data(leaf))
        array = np.asarray(leaf)
        return array.dtype.name, array.shape, array.tobytes()

    return [of_leaf(leaf) for leaf in jax.tree.leaves(tree)]


def test_a_state_comes_back_to_the_last_bit(tmp_path):
    tree = tree_of(7)
    checkpoint.save(tmp_path, 7, tree, {"seconds": 1.5})
    found, notes = checkpoint.load(tmp_path, 7, tree)
    assert bits(found) == bits(tree)
    assert notes == {"seconds": 1.5}
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    with np.load(tmp_path / "checkpoints" / "00000007.npz", allow_pickle=False) as archive:
        assert archive["['half']"].dtype == np.uint16
        assert len(archive.files) == 6


def test_float64_stays_float64(tmp_path, x64):
    tree = {"w": jnp.asarray([1 / 3], jnp.float64)}
    checkpoint.save(tmp_path, 1, tree, {})
    found, _ = checkpoint.load(tmp_path, 1, tree)
    assert bits(found) == bits(tree)


def test_the_two_newest_are_kept(tmp_path):
    for number in (1, 2, 10, 9999):
        checkpoint.save(tmp_path, number, tree_of(number), {})
    assert checkpoint.rounds(tmp_path) == [9999, 10]
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [
        "00000010.npz", "00009999.npz",
    ]  # fmt: skip


def test_what_came_after_a_damaged_state_is_not_kept(tmp_path):
    for number in (6, 8, 2):
        checkpoint.save(tmp_path, number, tree_of(number), {})
    assert checkpoint.rounds(tmp_path) == [2]


def test_no_flipped_bit_is_believed(tmp_path):
    """Every byte of the file, one bit each: refused, or (in a date, say) of no consequence."""
    tree = {"w": jnp.asarray([1.0, 2.0], jnp.float32), "b": jnp.asarray(3, jnp.int32)}
    checkpoint.save(tmp_path, 1, tree, {"seconds": 2.0})
    file = tmp_path / "checkpoints" / "00000001.npz"
    whole = file.read_bytes()
    refused = 0
    for place in range(len(whole)):
        broken = bytearray(whole)
        broken[place] ^= 1 << (place % 8)
        file.write_bytes(broken)
        try:
            found, notes = checkpoint.load(tmp_path, 1, tree)
        except checkpoint.DamagedError as error:
            refused += 1
            assert "\n" not in str(error)
        else:
            assert (bits(found), notes) == (bits(tree), {"seconds": 2.0}), place
    arrays = 3 * 128 + 4 * 3
    assert refused > arrays  # with the headers of numpy


@pytest.mark.parametrize("part", [0, 1, 100, -1, -30])
def test_a_file_cut_short_is_refused(part, tmp_path):
    tree = tree_of(1)
    checkpoint.save(tmp_path, 1, tree, {})
    file = tmp_path / "checkpoints" / "00000001.npz"
    file.write_bytes(file.read_bytes()[:part])
    with pytest.raises(checkpoint.DamagedError, match=r"00000001\.npz is damaged"):
        checkpoint.load(tmp_path, 1, tree)


def test_a_damaged_newest_is_passed_over_aloud(tmp_path, capsys):
    for number in (4, 8):
        checkpoint.save(tmp_path, number, tree_of(number), {})
    file = tmp_path / "checkpoints" / "00000008.npz"
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)
    found = checkpoint.newest([tmp_path], tree_of(1))
    assert found is not None
    number, [(tree, _)] = found
    assert (number, bits(tree)) == (4, bits(tree_of(4)))
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "00000008.npz is damaged" in message
    (tmp_path / "checkpoints" / "00000004.npz").write_bytes(b"")
    assert checkpoint.newest([tmp_path], tree_of(1)) is None


def test_points_go_on_from_the_newest_round_that_all_have(tmp_path):
    for point, numbers in (("a", (2, 4)), ("b", (2, 4, 6))):
        for number in numbers:
            checkpoint.save(tmp_path / point, number, tree_of(number), {})
    found = checkpoint.newest([tmp_path / "a", tmp_path / "b"], tree_of(1))
    assert found is not None
    assert found[0] == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": jnp.zeros((3, 2))}, r"got float32\[2, 3\], expected float32\[3, 2\]"),
        ({"count": jnp.zeros(())}, r"'count'\]: got int32\[\], expected float32\[\]"),
        ({"half": jnp.zeros(3, jnp.float16)}, r"got bfloat16\[3\], expected float16\[3\]"),
        ({"more": jnp.zeros(3)}, r"got none, expected \['more'\]"),
        ({"flag": None}, r"got \['flag'\], expected none"),
    ],
)  # fmt: skip
def test_another_networks_state_is_refused(change, message, tmp_path):
    checkpoint.save(tmp_path, 1, tree_of(1), {})
    with pytest.raises(ConfigError, match=message) as caught:
        checkpoint.load(tmp_path, 1, tree_of(1) | change)
    assert "\n" not in str(caught.value)


def test_pickles_are_refused(tmp_path):
    file = tmp_path / "checkpoints" / "00000001.npz"
    file.parent.mkdir()
    header = np.frombuffer(json.dumps({"format": 1}).encode(), np.uint8)
    np.savez(file, allow_pickle=True, notes=header, **{"['w']": np.array([{}], object)})
    with pytest.raises(checkpoint.DamagedError, match="allow_pickle"):
        checkpoint.load(tmp_path, 1, {"w": jnp.zeros(1)})


# --- Going on -------------------------------------------------------------------------------

QUICK = [
    "--model.name", "logistic", "--client.epochs", "1", "--data.examples_per_client", "20",
    "--server.optimizer", "momentum", "--server.lr", "0.5", "--quiet",
]  # fmt: skip
SWEEP = ["--sweep", "seed=0,1", "--sweep", "client.batch_size=10,20"]


def numbers(path):
    rows = folder.read_rows(path)
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def state_of(path):
    with np.load(path / "checkpoints" / f"{checkpoint.rounds(path)[0]:08d}.npz") as archive:
        return {name: array.tobytes() for name, array in archive.items() if name != "notes"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main([*QUICK, "--rounds", "6", "--checkpoint_every", "2", "--out", str(out)]) == 0
    return out


def interrupted(whole, out, *, rounds):
    """What a process that was killed after so many rounds leaves; the newest state may be older."""
    shutil.copytree(whole, out)
    for name in ("summary.json", "curves.png", "report.html"):
        (out / name).unlink()
    for number in checkpoint.rounds(out):
        if number > rounds:
            (out / "checkpoints" / f"{number:08d}.npz").unlink()
    folder.rewrite_rows(out, folder.read_rows(out)[:rounds])


def go_on(out, *flags):
    rounds = ["--rounds", "6", "--checkpoint_every", "2"]
    return main([*QUICK, *rounds, "--resume", "--out", str(out), *flags])


def test_a_run_goes_on_from_its_newest_state(whole, tmp_path):
    out = tmp_path / "run"
    interrupted(whole, out, rounds=5)
    assert checkpoint.rounds(out) == [4]
    assert go_on(out) == 0
    assert numbers(out) == numbers(whole)
    assert state_of(out) == state_of(whole)
    # The first four rounds are those that were there, not the same once more.
    assert folder.read_rows(out)[:4] == folder.read_rows(whole)[:4]


def test_a_line_that_was_cut_off_is_made_again(whole, tmp_path):
    out = tmp_path / "run"
    interrupted(whole, out, rounds=5)
    content = (out / "metrics.jsonl").read_bytes()
    (out / "metrics.jsonl").write_bytes(content[:-30])
    (out / "checkpoints" / ".00000006.npz.abc.tmp").write_bytes(b"cut off, too")
    assert go_on(out) == 0
    assert numbers(out) == numbers(whole)
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
    assert [path.name for path in (out / "checkpoints").glob(".*")] == []


def test_a_damaged_state_costs_rounds_but_no_number(whole, tmp_path, capsys):
    out = tmp_path / "run"
    interrupted(whole, out, rounds=6)
    newest = out / "checkpoints" / "00000006.npz"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 4
    newest.write_bytes(content)
    assert go_on(out) == 0
    assert "00000006.npz is damaged" in capsys.readouterr().err
    assert numbers(out) == numbers(whole)
    assert state_of(out) == state_of(whole)


def test_seconds_are_those_of_all_processes(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    before = json.loads((out / "summary.json").read_text())
    assert go_on(out, "--rounds", "8") == 0
    after = json.loads((out / "summary.json").read_text())
    for key in ("seconds", "compile_seconds", "train_seconds", "evaluate_seconds"):
        assert after[key] > before[key] > 0
    spent = sum(row["seconds"] for row in folder.read_rows(out))
    assert after["train_seconds"] == pytest.approx(spent, abs=0.01)


def test_rounds_that_are_added_need_not_fit_the_old_ones(tmp_path):
    """Five rounds, evaluated every ten, made twenty: no dispatch may leap over the end."""
    flags = [*QUICK, "--eval_every", "10"]
    out, long = tmp_path / "run", tmp_path / "long"
    assert main([*flags, "--rounds", "20", "--out", str(long)]) == 0
    assert main([*flags, "--rounds", "5", "--out", str(out)]) == 0
    assert main([*flags, "--rounds", "20", "--resume", "--out", str(out)]) == 0
    rows = folder.read_rows(out)
    assert [row["round"] for row in rows if row["test_loss"] is not None] == [5, 10, 20]
    assert rows[-1]["test_loss"] == pytest.approx(folder.read_rows(long)[-1]["test_loss"], rel=1e-5)


def test_a_finished_run_is_not_run_again(whole, tmp_path, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    monkeypatch.setattr(jaxfed.train, "compile_tasks", None)
    before = (out / "summary.json").read_bytes()
    assert go_on(out) == 0
    assert (out / "summary.json").read_bytes() == before


def table(out):
    with (out / "sweep.csv").open() as file:
        return [
            {key: value for key, value in row.items() if "seconds" not in key}
            for row in csv.DictReader(file)
        ]


def test_a_sweep_goes_on_where_it_was(tmp_path, monkeypatch):
    """Of its two programs the first is finished, the second was killed after four of six rounds."""
    out, cut = tmp_path / "whole", tmp_path / "cut"
    flags = [*QUICK, *SWEEP, "--rounds", "6", "--checkpoint_every", "2"]
    assert main([*flags, "--out", str(out)]) == 0
    shutil.copytree(out, cut)
    points = sorted(path for path in cut.iterdir() if path.is_dir())
    assert [path.name[:3] for path in points] == ["000", "001", "002", "003"]
    for path in (points[1], points[3]):  # batches of 20
        shutil.rmtree(path)
        interrupted(out / path.name, path, rounds=5)
    # Killed between the saving of one point's state and the other's.
    shutil.copy(out / points[3].name / "checkpoints" / "00000006.npz", points[3] / "checkpoints")
    for name in ("sweep.csv", "curves.png", "report.html"):
        (cut / name).unlink()
    kept = {path: path.read_bytes() for point in (points[0], points[2]) for path in point.iterdir()
            if path.is_file() and path.name != "config.json"}  # fmt: skip
    compiled = []
    real = jaxfed.train.compile_tasks
    monkeypatch.setattr(
        jaxfed.train, "compile_tasks", lambda *args: compiled.append(args) or real(*args)
    )
    assert main([*flags, "--resume", "--out", str(cut)]) == 0
    assert [args[2] for args in compiled] == [4]
    assert kept == {path: path.read_bytes() for path in kept}
    for path in points:
        assert numbers(path) == numbers(out / path.name)
        assert state_of(path) == state_of(out / path.name)
    assert table(cut) == table(out)


@pytest.mark.slow
def test_processes_that_are_killed(tmp_path):
    done = survive(tmp_path, kills=5, seed=1)
    assert done.kills == 5
    assert done.finished >= 1
    assert done.difference == 0


# --- Going on with something else -----------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--client.lr", "0.3", "--seed", "4"], "seed: was 0, now 4; client.lr: was 0.1, now 0.3"),
        (["--model.name", "mlp"], "model.name: was logistic, now mlp"),
        (["--rounds", "5"], "--rounds: got 5, expected 6 or more"),
        (["--sweep", "seed=0,1"], "holds a single run; leave --sweep out"),
    ],
)
def test_another_experiment_is_refused(flags, message, whole, capsys):
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    assert go_on(whole, *flags) == 2
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


def test_another_sweep_is_refused(tmp_path, capsys):
    out = str(tmp_path / "sweep")
    flags = [*QUICK, "--rounds", "1", "--out", out]
    assert main([*flags, "--sweep", "client.lr=0.1,0.2"]) == 0
    for other in (["--sweep", "client.lr=0.1,0.3"], ["--sweep", "seed=0,1"], []):
        assert main([*flags, *other, "--resume"]) == 2
        assert "a sweep with other points (such as 00" in capsys.readouterr().err


def test_rounds_that_are_missing_are_not_made_up(whole, tmp_path, capsys):
    out = tmp_path / "run"
    interrupted(whole, out, rounds=6)
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:2] + lines[3:]))
    assert go_on(out) == 2
    assert "holds 2 rounds, expected 6" in capsys.readouterr().err


# --- Two at once ----------------------------------------------------------------------------


@pytest.mark.parametrize("sweep", [[], SWEEP])
def test_a_second_process_is_refused(sweep, tmp_path, capsys):
    out = tmp_path / "run"
    with folder.locked(out):
        assert main([*QUICK, *sweep, "--out", str(out)]) == 2
        message = capsys.readouterr().err
        assert "another process is writing" in message
        assert message.count("\n") == 1
        assert [path.name for path in out.iterdir()] == [".lock"]
    assert list(out.iterdir()) == []


def test_a_lock_dies_with_its_process(tmp_path):
    code = (
        "import pathlib, sys, time\nfrom jaxfed import folder\n"
        "with folder.locked(pathlib.Path(sys.argv[1])):\n"
        "    print('locked', flush=True)\n    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(ConfigError, match="another process"), folder.locked(tmp_path):
            pass
        process.kill()
        process.wait()
    assert (tmp_path / ".lock").exists()
    with folder.locked(tmp_path):
        pass
    assert not (tmp_path / ".lock").exists()


# --- A disk that takes no more --------------------------------------------------------------


def test_a_full_disk_is_one_line_and_spoils_nothing(whole, tmp_path, capsys):
    """Files may not grow beyond a size that lies between that of the rows and of a state."""
    out = tmp_path / "run"
    interrupted(whole, out, rounds=4)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        assert go_on(out) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = capsys.readouterr().err
    assert message.startswith("jaxfed: File too large")
    assert "the files written before are whole" in message
    assert message.count("\n") == 1
    for path, content in before.items():
        if path.name != folder.PARTICIPATION:  # cut back to the saved state in one piece
            assert path.read_bytes().startswith(content)
    assert {path.name for path in out.rglob("*")} == {
        path.name for path in (*before, *out.iterdir())
    }
    assert go_on(out) == 0
    assert numbers(out) == numbers(whole)
    assert state_of(out) == state_of(whole)


@pytest.mark.parametrize("reason", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_a_folder_that_cannot_be_written_is_one_line(reason, tmp_path, capsys, monkeypatch):
    def mkdir(self, *args, **kwargs):
        raise OSError(reason, os.strerror(reason), str(self))

    monkeypatch.setattr("pathlib.Path.mkdir", mkdir)
    assert main([*QUICK, "--out", str(tmp_path / "run")]) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"jaxfed: {os.strerror(reason)} ({tmp_path / 'run'}); ")
    assert message.count("\n") == 1
