"""Datasets by name: the embedded digits, `.npz` files, TFDS and its cache, and fitting of sizes."""

import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from jaxfed.data import DataError, Dataset, fit, load
from jaxfed.data import cache as cache_files

ARRAYS = ("x_train", "y_train", "x_test", "y_test")


def test_digits_are_the_same_everywhere():
    digits = load("digits")
    assert digits.x_train.shape == (1438, 8, 8, 1)
    assert digits.x_train.dtype == np.uint8 and digits.y_train.dtype == np.int32
    assert (digits.x_train.min(), digits.x_train.max()) == (0, 255)
    counts = np.bincount(digits.y_test)
    assert counts.min() >= 34 and counts.max() <= 37  # stratified
    content = b"".join(getattr(digits, name).tobytes() for name in ARRAYS)
    assert hashlib.sha256(content).hexdigest()[:16] == "037a3b3c4bd09aff"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digit", "did you mean 'digits'"),
        ("mnits", "did you mean 'mnist'"),
        ("../mnist", "did you mean 'mnist'"),
        ("", "expected digits, a path that ends in .npz"),
        ("emnist/digit", "did you mean 'emnist/digits'"),
        ("mnist:9.9.9", "only: 3.0.1"),
    ],
)
def test_an_unknown_name_is_refused_with_a_suggestion(name, message, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXFED_DATA_DIR", str(tmp_path))
    with pytest.raises(DataError) as caught:
        load(name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# --- .npz ---------------------------------------------------------------------------------------


def arrays(**changes) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    good = {
        "x_train": rng.integers(0, 256, (6, 4, 4, 3)).astype(np.uint8),
        "y_train": np.array([0, 1, 2, 0, 1, 2]),
        "x_test": rng.integers(0, 256, (2, 4, 4, 3)).astype(np.uint8),
        "y_test": np.array([0, 3]),
    }
    return {name: value for name, value in (good | changes).items() if value is not None}


def write(path: Path, content: dict[str, np.ndarray]) -> str:
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=True, **content)
    return str(path)


def test_npz_round_trip(tmp_path):
    content = arrays()
    dataset = load(write(tmp_path / "a.npz", content))
    assert dataset.num_classes == 4  # a class that only the test set has counts
    assert dataset.client_train is None and dataset.client_test is None
    for name in ARRAYS:
        assert np.array_equal(getattr(dataset, name), content[name])
    assert dataset.y_train.dtype == np.int32


def test_npz_without_channels_gets_one(tmp_path):
    images = np.zeros((6, 5, 4), np.uint8)
    path = write(tmp_path / "a.npz", arrays(x_train=images, x_test=images[:2]))
    assert load(path).x_train.shape == (6, 5, 4, 1)


def test_npz_clients_become_dense_and_share_numbers(tmp_path):
    train, test = np.array(["zoe", "ann", "ann", "bob", "zoe", "bob"]), np.array(["zoe", "eve"])
    dataset = load(write(tmp_path / "a.npz", arrays(client_train=train, client_test=test)))
    assert dataset.client_train is not None and dataset.client_test is not None
    assert dataset.client_train.tolist() == [2, 0, 0, 1, 2, 1]
    assert dataset.client_test.tolist() == [2, 3]  # zoe is zoe; eve only occurs here
    dataset = load(write(tmp_path / "b.npz", arrays(client_train=np.array([9, 9, 7, 7, 8, 8]))))
    assert dataset.client_train is not None
    assert dataset.client_train.tolist() == [2, 2, 0, 0, 1, 1]


NAN = np.full((6, 4, 4, 3), np.nan, np.float32)
RAGGED = np.array([np.zeros((4, 4)), np.zeros((5, 4))] * 3, dtype=object)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "expected also y_test"),
        ({"x_train": NAN}, "float32 with NaN or infinity; expected finite numbers"),
        ({"x_train": np.zeros((6, 48), np.uint8)}, "shape (6, 48); expected images"),
        ({"x_train": np.zeros(6)}, "float64 (6,); expected uint8 images [N, H, W, C], or numbers"),
        ({"x_train": np.zeros((0, 4, 4, 3), np.uint8)}, "expected at least one example"),
        ({"x_train": np.zeros((6, 4, 0, 3), np.uint8)}, "expected at least one example"),
        ({"x_train": RAGGED}, "pickled Python objects; expected plain arrays, images all of one"),
        ({"x_test": np.zeros((2, 4, 5, 3), np.uint8)}, "examples of 4x4x3 and x_test of 4x5x3"),
        ({"x_test": np.zeros((2, 4, 4), np.uint8)}, "examples of 4x4x3 and x_test of 4x4x1"),
        ({"y_train": np.full(6, np.nan)}, "float64 with NaN or infinity; expected finite numbers"),
        ({"y_train": np.zeros(5, int)}, "shape (5,); expected (6, ...)"),
        ({"y_train": np.array([0, 1, -1, 0, 1, 2])}, "labels from -1 to 2"),
        ({"y_test": np.array([0, 10**6])}, "labels from 0 to 1000000"),
        ({"client_train": np.zeros(5, int)}, "client_train has shape (5,); expected (6,)"),
        ({"client_train": np.zeros(6)}, "client_train has dtype float64; expected integers or"),
        ({"client_test": np.zeros(2, int)}, "client_test without client_train"),
        (
            {"client_train": np.zeros(6, int), "client_test": np.array(["a", "b"])},
            "expected the same kind",
        ),
    ],
)
def test_npz_with_bad_arrays_is_refused_in_one_line(changes, message, tmp_path):
    path = write(tmp_path / "bad.npz", arrays(**changes))
    with pytest.raises(DataError) as caught:
        load(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(path)
    assert "\n" not in str(caught.value)


def test_npz_files_that_are_none(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load(str(tmp_path / "absent.npz"))
    (tmp_path / "text.npz").write_text("x,y\n1,2\n")
    with pytest.raises(DataError, match=r"not a \.npz"):
        load(str(tmp_path / "text.npz"))
    whole = Path(write(tmp_path / "whole.npz", arrays())).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"not a \.npz"):
        load(str(tmp_path / "cut.npz"))
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as other:
        other.writestr("x_train.npy", b"not an array")
    with pytest.raises(DataError, match="expected also y_train"):
        load(str(tmp_path / "other.npz"))
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as other:
        for name in ARRAYS:
            other.writestr(f"{name}.npy", b"not an array")
    with pytest.raises(DataError, match=r"x_train, .* not in \.npy format"):
        load(str(tmp_path / "other.npz"))
    position = whole.index(b"x_train.npy") + 200
    (tmp_path / "flipped.npz").write_bytes(
        whole[:position] + bytes([whole[position] ^ 255]) + whole[position + 1 :]
    )
    with pytest.raises(DataError, match=r"flipped\.npz: damaged"):
        load(str(tmp_path / "flipped.npz"))


# --- fit ----------------------------------------------------------------------------------------


def dataset_of(images: np.ndarray) -> Dataset:
    labels = np.zeros(len(images), np.int32)
    return Dataset("made", images, labels, images[:1], labels[:1], 1)


def random_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


@pytest.mark.parametrize(
    ("side", "size", "minimum", "fitted", "note"),
    [
        (28, None, 1, 28, ()),
        (28, 28, 28, 28, ()),
        (28, None, 32, 32, ("images padded from 28x28 to 32x32",)),
        (28, 55, 32, 55, ("images padded from 28x28 to 55x55",)),
        (28, 56, 32, 56, ("images resized from 28x28 to 56x56",)),
        (8, None, 32, 32, ("images resized from 8x8 to 32x32",)),
        (28, 14, 1, 14, ("images resized from 28x28 to 14x14",)),
        (32, None, 28, 32, ()),
    ],
)
def test_fit_pads_below_twice_the_side_and_resizes_otherwise(side, size, minimum, fitted, note):
    dataset = dataset_of(random_images(3, side, side, 1))
    result = fit(dataset, size, minimum)
    assert result.x_train.shape == (3, fitted, fitted, 1)
    assert result.x_test.shape == (1, fitted, fitted, 1)
    assert result.x_train.dtype == np.uint8
    assert result.notes == note
    if not note:
        assert result is dataset


def test_padding_is_centred():
    images = random_images(2, 28, 28, 1)
    padded = fit(dataset_of(images), 32).x_train
    assert np.array_equal(padded[:, 2:30, 2:30], images)
    assert padded.sum() == images.sum()


@pytest.mark.parametrize(("old", "new"), [(8, 32), (28, 14), (28, 64), (32, 13), (5, 1), (1, 4)])
def test_resizing_is_what_jax_does(old, new):
    import jax

    images = random_images(5, old, old, 3)
    expected = jax.image.resize(
        images.astype(np.float32), (5, new, new, 3), "bilinear", antialias=True
    )
    resized = fit(dataset_of(images), new).x_train
    np.testing.assert_allclose(resized, np.asarray(expected), atol=0.501)


def test_images_that_are_not_square_are_padded_to_squares_first():
    images = random_images(2, 6, 8, 1)
    square = fit(dataset_of(images))
    assert square.notes == ("images padded from 6x8 to 8x8",)
    assert np.array_equal(square.x_train[:, 1:7], images)
    assert np.array_equal(
        fit(dataset_of(images), 16).x_train,
        fit(square, 16).x_train,
    )


def test_resizing_in_chunks_changes_nothing(monkeypatch):
    dataset = dataset_of(random_images(7, 8, 8, 1))
    whole = fit(dataset, 20).x_train
    monkeypatch.setattr("jaxfed.data.resize.CHUNK", 3)
    assert np.array_equal(fit(dataset, 20).x_train, whole)


def test_a_size_below_the_models_minimum_is_refused():
    with pytest.raises(DataError, match="got image_size 28; expected at least 32"):
        fit(dataset_of(random_images(1, 28, 28, 1)), 28, 32)
    with pytest.raises(DataError, match="got image_size 0; expected at least 1"):
        fit(dataset_of(random_images(1, 28, 28, 1)), 0)


# --- TFDS and the cache -------------------------------------------------------------------------


@pytest.fixture(scope="session")
def builders():
    """Real TFDS datasets of a few images, by name; TFDS knows them like its own."""
    tfds = pytest.importorskip("tensorflow_datasets")
    image = pytest.importorskip("PIL.Image")

    def png(value: int, shape: tuple[int, ...]) -> io.BytesIO:
        file = io.BytesIO()
        image.fromarray(np.full(shape, value, np.uint8)).save(file, "PNG")
        file.seek(0)
        return file

    class JfSmall(tfds.core.GeneratorBasedBuilder):
        """Image i is filled with i. Subclasses change one thing each."""

        VERSION = tfds.core.Version("1.0.0")
        splits = {"train": 6, "test": 4}  # noqa: RUF012 (TFDS's own style)
        image = (8, 8, 1)
        more = {}  # noqa: RUF012

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=self.image),
                "label": tfds.features.ClassLabel(num_classes=3),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features | self.more)
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(n) for split, n in self.splits.items()}

        def _generate_examples(self, count):
            for i in range(count):
                example = {"image": png(i % 256, self.shape(i)), "label": self.label(i)}
                yield i, example | dict.fromkeys(self.more, 0)

        def shape(self, i):
            return (8, 8)

        def label(self, i):
            return i % 3

    def offline(self, dl_manager):
        raise RuntimeError("no network here\nand a second line")

    made = {
        "jf_tiny": {"splits": {"train": 600, "test": 20}},
        "jf_validation": {"splits": {"train": 6, "validation": 4}},
        "jf_train_only": {"splits": {"train": 6}},
        "jf_unlabelled": {"label": lambda self, i: -1},
        "jf_sizes": {"image": (None, None, 1), "shape": lambda self, i: (8 + i, 8)},
        "jf_two_labels": {"more": {"other": tfds.features.ClassLabel(num_classes=2)}},
        "jf_offline": {"_split_generators": offline},
    }
    return {
        name: type(name, (JfSmall,), {"name": name} | changes) for name, changes in made.items()
    }


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Empty data and cache folders."""
    monkeypatch.setenv("JAXFED_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("JAXFED_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "data", tmp_path / "cache"


@pytest.fixture
def tiny(builders, folders):
    """The first load of a dataset, which TFDS has to prepare, and what was reported meanwhile."""
    calls = []
    dataset = load("jf_tiny", lambda *call: calls.append(call))
    return dataset, calls, *folders


def same(one: Dataset, other: Dataset) -> bool:
    return one._replace(**dict.fromkeys(ARRAYS)) == other._replace(**dict.fromkeys(ARRAYS)) and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in ARRAYS
    )


def without_tfds(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)


def test_tfds_prepares_what_is_absent_and_reads_it(tiny):
    dataset, calls, data, _ = tiny
    assert dataset.x_train.shape == (600, 8, 8, 1) and dataset.x_test.shape == (20, 8, 8, 1)
    assert dataset.x_train.dtype == np.uint8 and dataset.y_train.dtype == np.int32
    assert dataset.num_classes == 3 and dataset.notes == ()
    values = dataset.x_test[:, 0, 0, 0]
    assert sorted(values) == list(range(20))
    assert np.array_equal(dataset.y_test, values % 3)  # each image keeps its label
    assert list((data / "jf_tiny" / "1.0.0").glob("*.array_record-*"))
    assert calls == [
        ("downloading jf_tiny with TFDS", 0, 1),
        ("downloading jf_tiny with TFDS", 1, 1),
        ("decoding jf_tiny train", 500, 600),
        ("decoding jf_tiny train", 600, 600),
        ("decoding jf_tiny test", 20, 20),
    ]


def test_the_second_start_needs_no_tfds(tiny, monkeypatch):
    dataset, _, _, _ = tiny
    without_tfds(monkeypatch)
    again = load("jf_tiny")
    assert same(again, dataset)
    assert not again.x_train.flags.writeable


def test_another_data_folder_does_not_meet_the_same_cache(tiny, tmp_path, monkeypatch):
    dataset, _, data, _ = tiny
    shutil.copytree(data, tmp_path / "copy")
    info = tmp_path / "copy" / "jf_tiny" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("1.0.0", "1.0.1"))
    monkeypatch.setenv("JAXFED_DATA_DIR", str(tmp_path / "copy"))
    without_tfds(monkeypatch)
    with pytest.raises(DataError, match="pip install"):
        load("jf_tiny")
    shutil.copytree(data, tmp_path / "same")
    monkeypatch.setenv("JAXFED_DATA_DIR", str(tmp_path / "same"))
    assert same(load("jf_tiny"), dataset)


def cached_folder(cache: Path) -> Path:
    (folder,) = (cache / "tfds").iterdir()
    return folder


def cut(folder: Path) -> None:
    file = folder / "x_train.npy"
    file.write_bytes(file.read_bytes()[:-1])


def flip(folder: Path) -> None:
    content = bytearray((folder / "y_train.npy").read_bytes())
    content[-1] ^= 1
    (folder / "y_train.npy").write_bytes(content)


def old_format(folder: Path) -> None:
    info = json.loads((folder / "info.json").read_text())
    (folder / "info.json").write_text(json.dumps(info | {"format": -1}))


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.write_bytes(b"")


DAMAGE = [
    cut,
    flip,
    old_format,
    empty,
    lambda folder: (folder / "y_test.npy").unlink(),
    lambda folder: (folder / "info.json").unlink(),
    lambda folder: (folder / "info.json").write_text("[]"),
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_made_again(damage, tiny, monkeypatch):
    dataset, _, _, cache = tiny
    dataset = dataset._replace(**{name: np.array(getattr(dataset, name)) for name in ARRAYS})
    damage(cached_folder(cache))
    calls = []
    assert same(load("jf_tiny", lambda *call: calls.append(call)), dataset)
    assert calls[-1] == ("decoding jf_tiny test", 20, 20)
    without_tfds(monkeypatch)
    assert same(load("jf_tiny"), dataset)
    assert [each.name for each in (cache / "tfds").iterdir()] == [cached_folder(cache).name]


def test_many_writers_at_once_leave_one_whole_cache(tmp_path):
    dataset = dataset_of(random_images(50, 8, 8, 1))
    folder = tmp_path / "tfds" / "made"
    folder.mkdir(parents=True)
    (folder / "info.json").write_text("damaged")
    with ThreadPoolExecutor(8) as pool:
        for written in [pool.submit(cache_files.store, folder, dataset) for _ in range(24)]:
            written.result()
    kept = cache_files.fetch(folder)
    assert kept is not None and same(kept, dataset)
    assert [each.name for each in folder.parent.iterdir()] == ["made"]


def test_two_processes_at_once(tiny):
    dataset, _, _, cache = tiny
    shutil.rmtree(cache)
    # A bare package instead of jaxfed's own start, which would import JAX.
    program = """
import importlib.util, sys, types
package = types.ModuleType("jaxfed")
package.__path__ = [sys.argv[1]]
sys.modules["jaxfed"] = package
from jaxfed.data import load
print(load("jf_tiny").x_train.sum(), "jax" in sys.modules)
"""
    spec = importlib.util.find_spec("jaxfed")
    assert spec is not None and spec.origin is not None
    command = [sys.executable, "-W", "error", "-c", program, str(Path(spec.origin).parent)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in running:
        output, _ = process.communicate(timeout=120)
        assert output.split() == [str(dataset.x_train.sum()), "False"]
        assert process.returncode == 0
    kept = cache_files.fetch(cached_folder(cache))
    assert kept is not None and same(kept, dataset)


def test_a_cache_that_cannot_be_written_is_a_note(builders, folders, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXFED_CACHE_DIR", str(tmp_path / "file"))
    dataset = load("jf_tiny")
    assert len(dataset.x_train) == 600
    assert len(dataset.notes) == 1
    assert "not cached" in dataset.notes[0] and "JAXFED_CACHE_DIR" in dataset.notes[0]


def test_the_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.delenv("JAXFED_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_files.root() == Path("/xdg/jaxfed")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_files.root() == Path("/home/somebody/.cache/jaxfed")
    monkeypatch.setenv("JAXFED_CACHE_DIR", "~/kept")
    assert cache_files.root() == Path("/home/somebody/kept")


def test_validation_stands_in_for_test(builders, folders, monkeypatch):
    dataset = load("jf_validation")
    assert len(dataset.x_test) == 4
    assert dataset.notes == ("tested on the validation split: there is no test split",)
    without_tfds(monkeypatch)
    assert load("jf_validation").notes == dataset.notes


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("jf_train_only", "has splits train; expected train and test"),
        ("jf_unlabelled", "6 of 6 examples of split train have no label"),
        ("jf_sizes", "images of several sizes"),
        ("jf_two_labels", "1 images and 2 class labels; expected one of each"),
        ("jf_offline", "(no network here); point JAXFED_DATA_DIR at"),
    ],
)
def test_tfds_datasets_that_do_not_fit_are_refused_in_one_line(name, message, builders, folders):
    with pytest.raises(DataError) as caught:
        load(name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not folders[1].exists()


def test_damaged_tfds_files_are_named(tiny):
    _, _, data, cache = tiny
    shutil.rmtree(cache)
    (file,) = (data / "jf_tiny" / "1.0.0").glob("*-train.array_record-*")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(DataError, match="damaged files in"):
        load("jf_tiny")
    (data / "jf_tiny" / "1.0.0" / "dataset_info.json").unlink()
    with pytest.raises(DataError, match="holds no prepared dataset; delete it"):
        load("jf_tiny")


def test_without_tfds_the_error_says_what_to_install(folders, monkeypatch):
    without_tfds(monkeypatch)
    with pytest.raises(DataError, match=r"run: pip install 'jaxfed\[tfds\]'"):
        load("mnist")


@pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is not None, reason="TensorFlow is installed"
)
def test_tfrecord_files_need_tensorflow(tiny):
    _, _, data, cache = tiny
    shutil.rmtree(cache)
    info = data / "jf_tiny" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(DataError, match=r"as tfrecord, which needs TensorFlow .*jaxfed\[tfds\]"):
        load("jf_tiny")


@pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None, reason="needs TensorFlow (jaxfed[tfds])"
)
def test_tfrecord_files_hold_the_same_examples(tiny, builders, tmp_path, monkeypatch):
    dataset, _, _, _ = tiny
    data = tmp_path / "tfrecord"
    builders["jf_tiny"](data_dir=data, file_format="tfrecord").download_and_prepare()
    monkeypatch.setenv("JAXFED_DATA_DIR", str(data))
    assert same(load("jf_tiny"), dataset)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_the_real_datasets(name, tmp_path, monkeypatch):
    data = os.environ.get("JAXFED_DATA_DIR", "")
    if not (Path(data) / name).is_dir():
        pytest.skip(f"JAXFED_DATA_DIR does not point at a folder with TFDS's {name}")
    monkeypatch.setenv("JAXFED_CACHE_DIR", str(tmp_path))
    dataset = load(name)
    assert dataset.x_train.shape == (60000, 28, 28, 1)
    assert dataset.x_test.shape == (10000, 28, 28, 1)
    assert (
        np.bincount(dataset.y_test).tolist()[:3]
        == {
            "mnist": [980, 1135, 1032],
            "fashion_mnist": [1000, 1000, 1000],
        }[name]
    )
    without_tfds(monkeypatch)
    assert same(load(name), dataset)
