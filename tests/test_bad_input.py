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
from numpy.typing import DTypeLike

import jaxfed
import jaxfed.train
from jaxfed.data import DataError, npz
from jaxfed.experiment import Experiment, dotted_keys, to_dict
from jaxfed.sweep import folder_name
from jaxfed.train import main

# Flags, and what the line that refuses them has to hold.
FLAGS = [
    ("--rounds 1.5", "--rounds: got '1.5', expected a whole number"),
    ("--rounds true", "--rounds: got 'true', expected a whole number"),
    ("--rounds 1e3", "--rounds: got '1e3', expected a whole number"),
    ("--rounds 0", "--rounds: got 0, expected 1 or more"),
    ("--rounds -3", "--rounds: got -3, expected 1 or more"),
    ("--rounds 10000000000", "--rounds: got 10000000000, expected less than 2147483648"),
    ("--rounds", "--rounds: got nothing, expected a whole number"),
    ("--round 3", "--round: unknown flag; did you mean --rounds?"),
    ("--lr 0.1", "--lr: unknown flag"),
    ("--client.learning_rate 0.1", "--client.learning_rate: unknown flag"),
    ("--eval_every 0", "--eval_every: got 0, expected 1 or more"),
    ("--eval_every 99999999999999999999", "--eval_every: got 99999999999999999999, expected less"),
    ("--seed 1.0", "--seed: got '1.0', expected a whole number"),
    ("--seed -1", "--seed: got -1, expected 0 or more"),
    ("--seed 2147483648", "--seed: got 2147483648, expected less than 2147483648"),
    ("--clients_per_round 0", "--clients_per_round: got 0"),
    ("--clients_per_round 11", "--clients_per_round: got 11, expected at most 10"),
    ("--clients_per_round 20 --data.num_clients 15", "got 20, expected at most 15"),
    (
        "--algorithm fedfoo",
        "--algorithm: got 'fedfoo', expected fedavg, fedprox,",
    ),
    ("--weighting size", "--weighting: got 'size', expected examples or uniform"),
    ("--dtype float16", "--dtype: got 'float16', expected float32, bfloat16 or float64"),
    ("--parallel all", "--parallel: got 'all', expected auto, loop, vmap or a whole number"),
    ("--parallel -2", "--parallel: got -2, expected 1 or more"),
    ("--parallel 99999999999", "--parallel: got 99999999999, expected less"),
    ("--client.lr 0,1", "--client.lr: got '0,1', expected a number"),
    ("--client.lr 0x10", "--client.lr: got '0x10', expected a number"),
    ("--client.lr -0.1", "--client.lr: got -0.1, expected a finite number, 0 or more"),
    ("--client.lr nan", "--client.lr: got nan, expected a finite number"),
    ("--client.lr inf", "--client.lr: got inf, expected a finite number"),
    ("--client.lr 1e400", "--client.lr: got inf, expected a finite number"),
    ("--client.lr 1e39", "--client.lr: got 1e+39, expected at most 3.4e+38"),
    ("--server.lr -1", "--server.lr: got -1.0, expected"),
    ("--server.lr nan", "--server.lr: got nan, expected"),
    ("--client.optimizer sgdm", "--client.optimizer: got 'sgdm', expected sgd, momentum,"),
    ("--client.momentum 0.9", "which has none; use --client.optimizer momentum"),
    ("--client.optimizer momentum --client.momentum 1", "expected 0 or more and below 1"),
    ("--client.optimizer momentum --client.momentum nan", "--client.momentum: got nan"),
    ("--server.momentum 0.5", "--server.momentum: got 0.5 with optimizer sgd"),
    ("--client.batch_size 0", "--client.batch_size: got 0, expected 1 or more"),
    ("--client.batch_size 1000000000000", "--client.batch_size: got 1000000000000, expected less"),
    ("--client.batch_size all", "--client.batch_size: got 'all', expected a whole number or None"),
    ("--client.epochs 0", "--client.epochs: got 0, expected 1 or more"),
    ("--client.epochs 2000000000", "--client.epochs: got 2000000000, which makes"),
    ("--client.shuffle yes", "--client.shuffle: got 'yes', expected True or False"),
    ("--client.prox_mu 0.1", "has no proximal term; add --algorithm fedprox"),
    ("--algorithm fedprox --client.prox_mu -1", "--client.prox_mu: got -1.0, expected"),
    ("--algorithm fedsgd --client.epochs 2", "--client.epochs: got 2 with algorithm fedsgd"),
    ("--algorithm central --weighting uniform", "--weighting: got uniform with algorithm central"),
    ("--data.dataset mnits", "mnits"),
    ("--data.dataset ../x", "--data.dataset: got dataset '../x'; expected digits"),
    ("--data.dataset /etc/passwd", "--data.dataset: got dataset '/etc/passwd'; expected digits"),
    ("--data.dataset mnist/../../x", "expected digits"),
    ("--data.dataset nowhere.npz", "nowhere.npz: no such file"),
    ("--data.partition idd", "(did you mean 'iid'?)"),
    ("--data.partition natural", "expected a .npz file with client_train"),
    ("--data.num_clients 0", "--data.num_clients: got 0"),
    ("--data.num_clients 1439", "got num_clients 1439; expected 1 to 1438"),
    ("--data.examples_per_client 0", "--data.examples_per_client: got 0"),
    ("--data.examples_per_client 144", "got 10 clients x 144 examples = 1440; expected at most"),
    ("--data.partition shards --data.shards_per_client 144", "= 1440 shards; expected at most"),
    ("--data.shards_per_client 0", "--data.shards_per_client: got 0"),
    ("--data.partition pathological --data.classes_per_client 11", "got classes_per_client 11"),
    ("--data.alpha 0", "--data.alpha: got 0.0, expected a number above 0"),
    ("--data.alpha -1", "--data.alpha: got -1.0, expected a number above 0"),
    ("--data.alpha inf", "--data.alpha: got inf"),
    ("--data.image_size 0", "--data.image_size: got 0, expected 1 or more"),
    ("--data.image_size 1000000", "--data.image_size: got 1000000, expected at most 4096"),
    ("--data.image_size 8 --model.name mobilenet-v1", "--data.image_size: got 8, expected 32"),
    ("--model.name resnet", "--model.name: got resnet, expected one of cnn, "),
    ("--model.width 0", "--model.width: got 0.0, expected a number above 0"),
    ("--model.width nan", "--model.width: got nan"),
    ("--model.width 1000000", "--model.width: got 1000000.0, which makes"),
    ("--model.name logistic --model.width 0.5", "got logistic with width 0.5"),
    ("--model.norm batchnorm", "--model.norm: got 'batchnorm', expected batch, group, layer, none"),
    ("--model.batch_stats mean", "--model.batch_stats: got mean, but the network has no BatchNorm"),
    ("--model.norm group --model.batch_stats mean", "which keeps no statistics"),
    ("--model.norm batch --model.batch_stats average", "got 'average', expected frozen, mean,"),
    ("--config", "Missing value for argument '--config'"),
    ("--config nowhere.json", "expected a readable JSON file (No such file or directory)"),
    ("--config .", "expected a readable JSON file (Is a directory)"),
    ("--resume", "--resume: got no --out"),
    ("--resume --out nowhere", "--resume: got --out 'nowhere', which holds no run"),
    ("--checkpoint_every 2", "--checkpoint_every: got no --out"),
    ("--checkpoint_every 0 --out new", "--checkpoint_every: got 0, expected 1 or more"),
    ("--out file", "--out: got 'file', expected a folder or a new name (File exists)"),
    ("--out file/new", "--out: got 'file/new', expected a folder or a new name (Not a directory)"),
    ("--out " + "x" * 300, "expected a folder or a new name (File name too long)"),
    ("--out a\0b", "expected a folder or a new name (embedded null byte)"),
    ("--quiet maybe", "maybe"),
    ("surplus", "surplus"),
    ("--name " + "x" * 2000, "--name: got 2000 characters, expected at most 1000"),
    ("--name \ud800", "--name: got '\\ud800', expected text without"),
    ("--sweep", "Missing value for argument '--sweep'"),
    ("--sweep client.lr", "--sweep: got 'client.lr', expected key=value,value,..."),
    ("--sweep =1", "--sweep: got '=1', expected key=value,value,..."),
    ("--sweep client.lr=", "--sweep: got 'client.lr=', expected"),
    ("--sweep client.lr=1,,2", "--sweep: got 'client.lr=1,,2', expected"),
    ("--sweep client.rate=1,2", "--client.rate: unknown key; did you mean"),
    ("--sweep client=1", "--client: unknown key"),
    ("--sweep client.lr=a", '--client.lr: got "a", expected a number'),
    ("--sweep client.lr=null", "--client.lr: got null, expected a number"),
    ("--sweep client.lr=NaN", "--client.lr: got nan, expected a finite number"),
    ("--sweep client.lr=[1]", "--client.lr: got [1], expected a number"),
    ("--sweep client.lr=0.1,-1", "--client.lr: got -1.0"),
    ("--sweep seed=1.5", "--seed: got 1.5, expected a whole number"),
    ("--sweep seed=true", "--seed: got true, expected a whole number"),
    ("--sweep seed=" + "9" * 5000, "--seed: got"),
    ("--sweep client.lr=0.1,0.10", "--sweep: got client.lr=0.1 twice, expected every value once"),
    ("--sweep seed=1 --sweep seed=2", "--sweep: got seed, seed, expected every key once"),
    ("--sweep model.name=cnn,resnet", "--model.name: got resnet"),
    ("--sweep seed=" + ",".join(map(str, range(10_001))), "--sweep: got 10001 points"),
    ("--sweep data.dataset=" + "[" * 5000, "--data.dataset: got 5000 characters"),
]

FILES = [
    ("", "is not JSON"),
    ("{", "is not JSON"),
    ('{"rounds": 3,}', "is not JSON"),
    ('{"rounds": 3} more', "is not JSON"),
    ("\x00", "is not JSON"),
    (b"\xff\xfe{}", "expected a readable JSON file ('utf-8' codec"),
    (b"\x80\x04K\x01.", "expected a readable JSON file ('utf-8' codec"),  # a pickle
    ("[" * 100_000, "is not JSON"),
    ('{"client":' * 100_000, "is not JSON"),
    ('{"seed": ' + "9" * 5000 + "}", "is not JSON"),
    ("null", "the experiment: got null, expected a JSON object"),
    ("[]", "the experiment: got [], expected a JSON object"),
    ('"rounds"', "expected a JSON object"),
    ('{"rounds": 3, "rounds": 4}', "got the key 'rounds' twice"),
    ('{"round": 3}', "--round: unknown key; did you mean rounds?"),
    ('{"": 3}', "unknown key"),
    ('{"client.lr": 3}', 'write {"client": {"lr": ...}}'),
    ('{"client": {"lrate": 0.1}}', "--client.lrate: unknown key; did you mean client.lr?"),
    ('{"client": {"client": {}}}', "--client.client: unknown key"),
    ('{"client": null}', "--client: got null, expected a JSON object"),
    ('{"client": [0.1]}', "--client: got [0.1], expected a JSON object"),
    ('{"data": "mnist"}', '--data: got "mnist", expected a JSON object'),
    ('{"rounds": "3"}', '--rounds: got "3", expected a whole number'),
    ('{"rounds": true}', "--rounds: got true, expected a whole number"),
    ('{"rounds": null}', "--rounds: got null, expected a whole number"),
    ('{"rounds": 1.5}', "--rounds: got 1.5, expected a whole number"),
    ('{"rounds": NaN}', "--rounds: got NaN, expected a whole number"),
    ('{"rounds": 1e300}', "expected less than 2147483648"),
    ('{"rounds": {}}', "--rounds: got {}, expected a whole number"),
    ('{"client": {"lr": "0.1"}}', '--client.lr: got "0.1", expected a number'),
    ('{"client": {"lr": true}}', "--client.lr: got true, expected a number"),
    ('{"client": {"lr": null}}', "--client.lr: got null, expected a number"),
    ('{"client": {"lr": NaN}}', "--client.lr: got nan, expected a finite number"),
    ('{"client": {"lr": 1e999}}', "--client.lr: got inf, expected a finite number"),
    ('{"client": {"lr": ' + "9" * 400 + "}}", "--client.lr: got 9999"),
    ('{"client": {"shuffle": 1}}', "--client.shuffle: got 1, expected true or false"),
    ('{"client": {"shuffle": "false"}}', '--client.shuffle: got "false", expected true or false'),
    ('{"client": {"optimizer": 3}}', "--client.optimizer: got 3, expected sgd,"),
    ('{"parallel": true}', "--parallel: got true, expected auto, loop, vmap or a whole number"),
    ('{"parallel": 0}', "--parallel: got 0, expected 1 or more"),
    ('{"name": 3}', "--name: got 3, expected a text"),
    ('{"name": "\\ud800"}', "expected text without lone surrogates"),
    ('{"data": {"dataset": 3}}', "--data.dataset: got 3, expected a text"),
    ('{"data": {"dataset": "a\\u0000b.npz"}}', "no such file"),
    ('{"model": {"norm": "BATCH"}}', '--model.norm: got "BATCH", expected batch,'),
]  # fmt: skip


def x(*shape: int, dtype: DTypeLike = np.uint8):
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


GOOD = {
    "x_train": x(6, 4, 4, 1), "y_train": np.array([0, 1, 2, 0, 1, 2]),
    "x_test": x(3, 4, 4, 1), "y_test": np.array([0, 1, 2]),
}  # fmt: skip
NAN = np.full((6, 4, 4, 1), np.nan, np.float32)
ARRAYS = [
    ({"x_train": None}, "expected also x_train"),
    ({"y_train": None}, "expected also y_train"),
    ({"x_test": None, "y_test": None}, "expected also x_test, y_test"),
    (dict.fromkeys(GOOD), "holds other; expected also"),
    ({"x_train": NAN}, "x_train has dtype float32 with NaN; expected uint8"),
    ({"x_train": x(6, 4, 4, 1, dtype=np.float64) / 255}, "has dtype float64; expected uint8"),
    ({"x_train": x(6, 4, 4, 1, dtype=np.int64)}, "has dtype int64; expected uint8"),
    ({"x_train": x(6, 4, 4, 1, dtype=np.int8)}, "has dtype int8; expected uint8"),
    ({"x_train": x(6, 4, 4, 1) > 3}, "has dtype bool; expected uint8"),
    ({"x_train": x(6, 16)}, "x_train has shape (6, 16); expected [N, H, W, C]"),
    ({"x_train": x(6, 1, 4, 4, 1)}, "expected [N, H, W, C]"),
    ({"x_train": np.uint8(3)}, "x_train has shape (); expected"),
    ({"x_train": x(0, 4, 4, 1), "y_train": x(0)}, "expected at least one image"),
    ({"x_test": x(0, 4, 4, 1), "y_test": x(0)}, "expected at least one image"),
    ({"x_train": x(6, 0, 4, 1)}, "expected at least one image"),
    ({"x_train": x(6, 4, 4, 0)}, "expected at least one image"),
    ({"x_test": x(3, 5, 4, 1)}, "images of 4x4x1 and x_test of 5x4x1; expected one size"),
    ({"x_test": x(3, 4, 4, 3)}, "expected one size"),
    ({"y_train": np.array([0, 1, 2])}, "y_train has shape (3,); expected (6,)"),
    ({"y_train": np.eye(6, 3, dtype=int)}, "y_train has shape (6, 3); expected (6,)"),
    ({"y_train": np.array([0, 1, 2, 0, 1, 2.0])}, "y_train has dtype float64; expected integer"),
    ({"y_train": np.array(["a"] * 6)}, "y_train has dtype <U1; expected integer"),
    ({"y_train": np.array([True] * 6)}, "y_train has dtype bool; expected integer"),
    ({"y_test": np.array([0, 1, -1])}, "y_test has labels from -1 to 1; expected"),
    ({"y_test": np.array([0, 1, 2**40])}, "y_test has labels from 0 to 1099511627776"),
    ({"y_test": np.array([0, 1, 2**64 - 1], np.uint64)}, "y_test has labels from 0 to 18446744"),
    ({"client_train": np.array([0, 1])}, "client_train has shape (2,); expected (6,)"),
    ({"client_train": np.zeros(6)}, "client_train has dtype float64; expected integers or"),
    ({"client_test": np.zeros(3, int)}, "holds client_test without client_train"),
    ({"client_train": np.zeros(6, int), "client_test": np.array(["a"] * 3)}, "same kind of id"),
    ({"client_train": np.zeros(6, int), "client_test": np.zeros(2, int)}, "expected (3,)"),
    ({"x_train": np.array([{}, 1], object)}, "holds pickled Python objects"),
    ({"y_train": np.array([None] * 6, object)}, "holds pickled Python objects"),
    ({"client_train": np.array([[1], [1, 2]], object)}, "holds pickled Python objects"),
]  # fmt: skip


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


def write(path, changes):
    held = {name: array for name, array in (GOOD | changes).items() if array is not None}
    np.savez(path, allow_pickle=True, **(held or {"other": np.zeros(1)}))


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


def test_there_are_as_many_as_is_said():
    assert len(FLAGS) + len(FILES) + len(ARRAYS) + 6 >= 190


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
    assert found.x_train.dtype == found.x_test.dtype == np.uint8
    assert found.x_train.ndim == 4
    assert found.x_train.shape[1:] == found.x_test.shape[1:]
    for images_, labels_ in ((found.x_train, found.y_train), (found.x_test, found.y_test)):
        assert len(images_) == len(labels_) > 0
        assert labels_.min() >= 0
        assert labels_.max() < found.num_classes
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
