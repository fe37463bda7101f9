"""Runs survive: damaged files, processes that are killed, two at once, a full disk."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfed import checkpoint
from jaxfed.experiment import ConfigError

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
