"""What a command asks of JAX: every core, compiled programs kept, and what that leaves alone."""

import os
import subprocess
import sys

import pytest

from jaxfed.machine import MAX_CPU_DEVICES

pytestmark = pytest.mark.slow
RUN = (
    "--rounds", "2", "--model.name", "cnn-small", "--model.norm", "batch",
    "--data.num_clients", "3", "--data.examples_per_client", "40", "--out",
)  # fmt: skip
CORES = min(len(os.sched_getaffinity(0)), MAX_CPU_DEVICES) if sys.platform == "linux" else None


def devices(environment, before=""):
    """How many devices JAX has after `use_all_cores`."""
    code = f"import jax\n{before}\nfrom jaxfed.machine import use_all_cores\nuse_all_cores()\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "print(len(jax.devices()))"],
        env=environment, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert done.stderr == ""
    return int(done.stdout)


@pytest.fixture
def own(users_environment, tmp_path):
    """A user's environment with a cache of its own."""
    return users_environment | {"JAXFED_CACHE_DIR": str(tmp_path / "cache")}


@pytest.mark.skipif(CORES is None, reason="counts cores as Linux does")
def test_every_core_is_a_device(own):
    assert devices(own) == CORES


def test_the_users_number_of_devices_has_its_way(own):
    assert devices(own | {"JAX_NUM_CPU_DEVICES": "3"}) == 3
    assert devices(own | {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}) == 3
    assert devices(own, before="jax.devices()") == 1  # too late, and no error


def test_flags_are_set_once(own):
    """Kept programs are known by them: a process that a command starts finds its own again."""
    code = (
        "import os\nfrom jaxfed.machine import use_all_cores\n"
        "use_all_cores()\nonce = os.environ['XLA_FLAGS']\nuse_all_cores()\n"
        "assert once and os.environ['XLA_FLAGS'] == once, os.environ['XLA_FLAGS']\n"
    )
    subprocess.run([sys.executable, "-c", code], env=own, check=True, timeout=120)


def test_programs_are_kept_and_mended(own, tmp_path):
    def run(name):
        done = subprocess.run(
            [sys.executable, "-m", "jaxfed.train", *RUN, name],
            cwd=tmp_path, env=own, capture_output=True, text=True, check=True, timeout=300,
        )  # fmt: skip
        assert done.stderr == ""
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [line.partition('"seconds"')[0] for line in lines]

    first = run("a")
    kept = sorted((tmp_path / "cache" / "programs").iterdir())
    assert len(kept) >= 2  # training and evaluation
    assert run("b") == first
    assert sorted((tmp_path / "cache" / "programs").iterdir()) == kept  # nothing was compiled
    for file in kept:  # as after a write that was cut short
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert run("c") == first
    assert run("d") == first
    mended = sorted((tmp_path / "cache" / "programs").iterdir())
    assert mended and all(file.stat().st_size > 100 for file in mended)
