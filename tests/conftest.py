"""Types and shapes are checked while the tests run (jaxtyping + beartype)."""

import os
import warnings

import pytest

# Nearly all the time goes into compiling programs that run once: a quick compiler, a third as slow.
QUICK = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false",
    "JAX_NUM_CPU_DEVICES": "1",  # the tests share the cores already
}
for name, value in ({"JAX_PLATFORMS": "cpu"} | QUICK).items():
    os.environ.setdefault(name, value)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from jaxtyping import install_import_hook

    with install_import_hook("jaxfed", "beartype.beartype"):
        import jaxfed
        import jaxfed.train
    # Under the hook, before any test can import them without it.
    assert jaxfed.train.Command

    import jax


@pytest.fixture(autouse=True, scope="session")
def cache_folder(tmp_path_factory):
    """Decoded datasets go to a folder of this test run, unless one is named."""
    if "JAXFED_CACHE_DIR" not in os.environ:
        os.environ["JAXFED_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def users_environment(cache_folder):
    """For commands that are to be compiled as a user's are."""
    return {name: value for name, value in os.environ.items() if name not in QUICK}


@pytest.fixture
def x64():
    """Runs a test in float64."""
    with jax.enable_x64(True):
        yield
