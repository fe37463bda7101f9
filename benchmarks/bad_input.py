"""What cannot work, and the line that refuses it.

    python -m benchmarks.bad_input

gives every wrong flag, JSON file and `.npz` file of the tables below to `python -m jaxfed.train`
(in this process), and prints the line that each is answered with and how many were refused.
"""

import contextlib
import io
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from jaxfed.train import main as train

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
    ("--algorithm fedfoo", "--algorithm: got fedfoo, expected one of fedavg, fedprox,"),
    ("--algorithm nowhere:fedfoo", "expected module:object, both importable"),
    ("--algorithm json:dumps2", "expected module:object, both importable"),
    ("--task classify", "--task: got classify, expected one of classification, next-token,"),
    ("--task regression --client.label_smoothing 0.1", "which has no classes; leave it out"),
    ("--task multilabel", "--task: got multilabel for y_train of int32 [1438], expected 0 or 1"),
    ("--init nowhere.npz", "--init: got 'nowhere.npz', expected a weights.npz"),
    ("--stop_at nan", "--stop_at: got nan, expected a finite number"),
    ("--weighting size", "--weighting: got 'size', expected examples, uniform or None"),
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
    ("--client.optimizer sgdm", "--client.optimizer: got sgdm, expected one of sgd, momentum,"),
    (
        "--client.optimizer adam --client.momentum 0.9",
        "with optimizer adam, which has no momentum; use --client.optimizer sgd, momentum or",
    ),
    ("--client.momentum 1", "--client.momentum: got 1.0, expected 0 or more and below 1"),
    ("--client.b1 0.9", "--client.b1: got 0.9 with optimizer sgd, which has no b1; use"),
    ("--client.optimizer adam --client.b2 1", "--client.b2: got 1.0, expected 0 or more and"),
    ("--server.optimizer adam --server.epsilon -1", "--server.epsilon: got -1.0, expected"),
    ("--server.weight_decay nan", "--server.weight_decay: got nan, expected a finite number"),
    ("--client.clip 0", "--client.clip: got 0.0, expected a number above 0"),
    ("--client.schedule linear", "got 'linear', expected constant, exponential, cosine or None"),
    (
        "--client.schedule cosine --client.lr_decay 0.9",
        "with schedule cosine; use --client.schedule exponential or leave it out",
    ),
    ("--server.warmup 0", "--server.warmup: got 0, expected 1 or more"),
    ("--server.aggregator average", "--server.aggregator: got average, expected one of mean"),
    ("--client.label_smoothing 1", "--client.label_smoothing: got 1.0, expected 0 or more and"),
    ("--client.optimizer momentum --client.momentum 1", "expected 0 or more and below 1"),
    ("--client.optimizer momentum --client.momentum nan", "--client.momentum: got nan"),
    ("--server.optimizer yogi --server.momentum 0.5", "got 0.5 with optimizer yogi"),
    ("--client.batch_size 0", "--client.batch_size: got 0, expected 1 or more"),
    ("--client.batch_size 1000000000000", "--client.batch_size: got 1000000000000, expected less"),
    ("--client.batch_size all", "--client.batch_size: got 'all', expected a whole number or None"),
    ("--client.epochs 0", "--client.epochs: got 0, expected 1 or more"),
    ("--client.epochs 2000000000", "--client.epochs: got 2000000000, which makes"),
    ("--client.shuffle yes", "--client.shuffle: got 'yes', expected True or False"),
    ("--client.mu 0.1", "which does not use it; leave it out, or use --algorithm fedprox"),
    ("--client.prox_mu 0.1", "which does not use it; leave it out, or use --algorithm fedprox"),
    ("--algorithm fedprox --client.mu -1", "--client.mu: got -1.0, expected"),
    ("--algorithm fedsgd --client.epochs 2", "--client.epochs: got 2 with algorithm fedsgd"),
    ("--algorithm fedsgd --client.lr 0.1", "--client.lr: got 0.1 with algorithm fedsgd"),
    ("--algorithm central --server.lr 1", "--server.lr: got 1.0 with algorithm central"),
    ("--algorithm central --weighting uniform", "--weighting: got uniform with algorithm central"),
    ("--data.dataset mnits", "mnits"),
    ("--data.dataset ../x", "--data.dataset: got dataset '../x'; expected digits"),
    ("--data.dataset /etc/passwd", "--data.dataset: got dataset '/etc/passwd'; expected digits"),
    ("--data.dataset mnist/../../x", "expected digits"),
    ("--data.dataset nowhere.npz", "nowhere.npz: no such file"),
    ("--data.partition idd", "did you mean iid?"),
    ("--data.alpha 0.5", "--data.alpha: got 0.5 with partition iid, which does not use it"),
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
    ("--model.input_range 0..2", "--model.input_range: got '0..2', expected 0..1, -1..1, 0..255"),
    ("--model.frozen conv9/*", "--model.frozen: got 'conv9/*', which matches no parameter"),
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
    ('{"client": {"mu": 0.1, "prox_mu": 0.1}}', "got it beside mu, which is the same key"),
    ('{"client": {"lr": NaN}}', "--client.lr: got nan, expected a finite number"),
    ('{"client": {"lr": 1e999}}', "--client.lr: got inf, expected a finite number"),
    ('{"client": {"lr": ' + "9" * 400 + "}}", "--client.lr: got 9999"),
    ('{"client": {"shuffle": 1}}', "--client.shuffle: got 1, expected true or false"),
    ('{"client": {"shuffle": "false"}}', '--client.shuffle: got "false", expected true or false'),
    ('{"client": {"optimizer": 3}}', "--client.optimizer: got 3, expected a text or null"),
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
    ({"x_train": NAN}, "x_train has dtype float32 with NaN or infinity; expected finite"),
    ({"x_train": NAN[:, 0, 0, 0]}, "x_train is float32 (6,); expected uint8 images"),
    ({"x_train": x(6, 4, 4, 1) * 1j}, "x_train is complex128 (6, 4, 4, 1); expected uint8"),
    ({"x_train": x(6, 16)}, "x_train has shape (6, 16); expected images [N, H, W, C]"),
    ({"x_train": x(6, 1, 4, 4, 1)}, "expected images [N, H, W, C]"),
    ({"x_train": np.uint8(3)}, "x_train has shape (); expected"),
    ({"x_train": x(0, 4, 4, 1), "y_train": x(0)}, "expected at least one example"),
    ({"x_test": x(0, 4, 4, 1), "y_test": x(0)}, "expected at least one example"),
    ({"x_train": x(6, 0, 4, 1)}, "expected at least one example"),
    ({"x_train": x(6, 4, 4, 0)}, "expected at least one example"),
    ({"x_test": x(3, 5, 4, 1)}, "examples of 4x4x1 and x_test of 5x4x1; expected one size"),
    ({"x_test": x(3, 4, 4, 3)}, "expected one size"),
    ({"y_train": np.array([0, 1, 2])}, "y_train has shape (3,); expected (6, ...)"),
    ({"y_train": np.array([0, 1, 2, 0, 1, np.inf])}, "y_train has dtype float64 with NaN or"),
    ({"y_train": np.zeros((6, 0))}, "y_train has shape (6, 0); expected at least one target"),
    ({"y_train": np.array(["a"] * 6)}, "y_train has dtype <U1; expected numbers"),
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


def write(path: Path, changes: Mapping[str, Any]) -> None:
    """Writes the good arrays with some of them changed, or (None) left out."""
    held = {name: array for name, array in (GOOD | dict(changes)).items() if array is not None}
    np.savez(path, allow_pickle=True, **(held or {"other": np.zeros(1)}))


def commands(folder: Path) -> Iterator[tuple[str, list[str], str]]:
    """What is wrong, the arguments that say so, and what the answer has to hold."""
    (folder / "file").write_text("")
    for flags, message in FLAGS:
        yield flags, flags.split(" "), message
    for number, (content, message) in enumerate(FILES):
        path = folder / f"{number}.json"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        yield repr(content), ["--config", str(path)], message
    for number, (changes, message) in enumerate(ARRAYS):
        path = folder / f"{number}.npz"
        write(path, changes)
        held = ", ".join(f"{k} {getattr(v, 'dtype', '')}{np.shape(v)}" for k, v in changes.items())
        flags = ["--data.dataset", str(path), "--model.name", "logistic"]
        yield f".npz with {held}", flags, message


def main() -> int:
    """Exit code 1 if one of them is not refused by one line that says what is wrong."""
    tried, refused = 0, 0
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        for what, arguments, message in commands(Path(name)):
            said = io.StringIO()
            with contextlib.redirect_stderr(said):
                code = train(arguments)
            answer = said.getvalue()
            good = code == 2 and answer.count("\n") == 1 and message in answer
            tried, refused = tried + 1, refused + good
            line = f"{'' if good else 'NOT REFUSED: '}{what[:60]!r:62}  {answer.strip()}"
            print(line.encode(errors="backslashreplace").decode(), flush=True)
    print(f"{tried} inputs tried, {refused} refused in one line")
    return 0 if tried == refused else 1


if __name__ == "__main__":
    sys.exit(main())
