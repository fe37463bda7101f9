"""What cannot work is refused: one line, exit code 2, before anything is compiled or written."""

import ast
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import jaxfed
import jaxfed.train
from benchmarks.bad_input import ARRAYS, FILES, FLAGS, write
from benchmarks.bad_input import main as print_them
from jaxfed.config import Experiment, dotted_keys, to_dict
from jaxfed.config.sweep import folder_name
from jaxfed.data import DataError, npz
from jaxfed.train import main


@pytest.fixture(autouse=True)
def nothing_is_compiled_or_left(tmp_path, monkeypatch):
    def compiled(*_):
        raise AssertionError("accepted")

    monkeypatch.setattr(jaxfed.train, "compile_tasks", compiled)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)


def refused(arguments, capsys):
    """The one line that refuses them."""
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("jaxfed: ")
    assert printed.err.count("\n") == 1
    assert "  " not in printed.err
    return printed.err


def short(text):
    return re.sub(r"\W+", "-", str(text))[:40]


@pytest.mark.parametrize(("flags", "message"), FLAGS, ids=[short(f) for f, _ in FLAGS])
def test_flags(flags, message, tmp_path, capsys):
    (tmp_path / "work" / "file").write_text("")
    assert message in refused(flags.split(" "), capsys)
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["file"]


@pytest.mark.parametrize(("content", "message"), FILES, ids=[short(f[:40]) for f, _ in FILES])
def test_json_files(content, message, tmp_path, capsys):
    path = tmp_path / "experiment.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in refused(["--config", str(path)], capsys)


@pytest.mark.parametrize(("changes", "message"), ARRAYS, ids=[short(m) for _, m in ARRAYS])
def test_npz_files(changes, message, tmp_path, capsys):
    path = tmp_path / "images.npz"
    write(path, changes)
    line = refused(["--data.dataset", str(path), "--model.name", "logistic"], capsys)
    assert message in line
    assert str(path) in line


def test_npz_files_that_are_broken(tmp_path, capsys):
    path = tmp_path / "images.npz"
    write(path, {})
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:200] + bytes([whole[200] ^ 1]) + whole[201:]
    for content, message in (
        (b"", "not a .npz (zip) file"),
        (b"GIF89a", "not a .npz (zip) file"),
        (whole[:middle], "not a .npz (zip) file"),
        (whole[middle:], "damaged"),
        (flipped, "damaged"),
    ):
        path.write_bytes(content)
        assert message in refused(["--data.dataset", str(path)], capsys), message
    path.unlink()
    path.mkdir()
    assert "no such file" in refused(["--data.dataset", str(path)], capsys)


def test_the_command_prints_what_every_one_is_answered(tmp_path, capsys):
    assert print_them() == 0
    *lines, last = capsys.readouterr().out.splitlines()
    count = len(FLAGS) + len(FILES) + len(ARRAYS)
    assert count >= 180
    assert last == f"{count} inputs tried, {count} refused in one line"
    assert sum("jaxfed: " in line for line in lines) == count


# --- Anything at all ------------------------------------------------------------------------

keys = st.sampled_from([*to_dict(Experiment()), *dotted_keys(), "lr", "epochs", "dataset", "x"])
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["digits", "cnn", "batch", "adam", "fedprox", "iid"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
in_one_test = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@in_one_test
@given(anything)
def test_any_json_is_refused_in_one_line_or_runs(tmp_path, capsys, monkeypatch, tree):
    def stop(*_, **__):
        raise DataError("a valid experiment: not loaded here")

    monkeypatch.setattr(jaxfed.train, "prepare", stop)
    path = tmp_path / "experiment.json"
    path.write_text(json.dumps(tree))
    refused(["--config", str(path)], capsys)


sides = st.tuples(*[st.integers(0, 3)] * 4) | st.lists(st.integers(0, 3), max_size=5).map(tuple)
images = st.builds(lambda shape: np.ones(shape, "u1"), sides) | arrays.arrays(
    st.sampled_from([np.dtype(d) for d in ("u1", "i4", "f4", "?", "U2")]), sides
)
labels = arrays.arrays(
    st.sampled_from([np.dtype(d) for d in ("i4", "i8", "f4")]), st.integers(0, 4)
)
ids = arrays.arrays(st.sampled_from([np.dtype(d) for d in ("i4", "U2", "f4")]), st.integers(0, 4))


@in_one_test
@given(st.tuples(images, labels, images, labels, st.none() | ids, st.none() | ids))
def test_any_arrays_are_a_dataset_or_refused(tmp_path, made):
    names = ("x_train", "y_train", "x_test", "y_test", "client_train", "client_test")
    path = tmp_path / "any.npz"
    held = {name: array for name, array in zip(names, made, strict=True) if array is not None}
    np.savez(path, **held)
    try:
        found = npz.read(str(path))
    except DataError as error:
        assert "\n" not in str(error)
        return
    assert found.x_train.ndim > 1
    assert found.x_train.shape[1:] == found.x_test.shape[1:]
    for inputs, targets in ((found.x_train, found.y_train), (found.x_test, found.y_test)):
        assert inputs.dtype != np.uint8 or inputs.ndim == 4
        assert len(inputs) == len(targets) > 0
        if targets.dtype.kind == "f":
            assert np.isfinite(targets).all()
        elif found.num_classes:
            assert targets.min() >= 0
            assert targets.max() < found.num_classes
    if found.client_train is not None:
        assert len(found.client_train) == len(found.y_train)


# --- Nothing is written outside -------------------------------------------------------------


def test_no_value_of_a_sweep_leaves_its_folder():
    for value in ("../../x", "/etc/x", "..", "a/b\\c", "~", "a\nb", "$(x)", "x" * 500, "\0"):
        name = folder_name(3, {"name": value})
        assert re.fullmatch(r"003_[\w.=-]{1,120}", name), name


def test_names_that_look_like_paths_are_only_names(tmp_path, monkeypatch):
    monkeypatch.undo()
    out = tmp_path / "work" / "out"
    flags = ["--model.name", "logistic", "--rounds", "1", "--quiet", "--out", str(out)]
    assert main([*flags, "--name", "../../x", "--sweep", "name=../../a,/b"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["work"]
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["out"]
    points = sorted(path.name for path in out.iterdir() if path.is_dir())
    assert points == ["000_name=..-..-a", "001_name=-b"]


def test_nothing_here_evaluates_or_unpickles():
    for path in Path(jaxfed.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "__import__"), path
            if isinstance(node, ast.Import):
                assert "pickle" not in [name.name for name in node.names], path
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert ast.unparse(node.value) == "False", path
