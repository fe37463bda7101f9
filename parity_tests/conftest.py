"""The environment of TFF, made on first use."""

import os

import pytest

# Before anything imports JAX: programs that run once are compiled quickly.
for name, value in {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}.items():
    os.environ.setdefault(name, value)

from tff_reference import environment  # noqa: E402


@pytest.fixture(scope="session")
def tff_python(request):
    """TFF's interpreter; what needs it is skipped where there is no Python that can run TFF."""
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():  # the first time takes minutes, and says so
        try:
            return environment.ensure()
        except environment.NoPython as error:
            pytest.skip(str(error))
