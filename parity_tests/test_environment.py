"""How TFF's environment is made, with a toy in place of TFF: real environments, no downloads."""

import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from tff_reference import environment
from tff_reference.environment import FINISHED, LOCK, TFF, Contents, NoPython, ensure


def toy_package(folder):
    """A package of one module, where the requirements below have pip look for it."""
    with zipfile.ZipFile(folder / "toytff-1.0-py3-none-any.whl", "w") as wheel:
        info = "toytff-1.0.dist-info"
        wheel.writestr("toytff.py", "answer = 42\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: toytff\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", f"toytff.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n")


def toy_contents(folder, pin="toytff==1.0"):
    requirements = folder / f"{pin}.txt"
    requirements.write_text(f"--no-index\n--find-links {folder}\n{pin}\n")
    return Contents("toy", requirements, module="toytff", free_bytes=0, cost="a toy")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXFED_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("JAXFED_TFF_ENV", raising=False)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def here():
    """This interpreter, where TFF could run in it."""
    try:
        return environment._suitable([sys.executable])
    except NoPython as error:
        pytest.skip(str(error))


def answer(python):
    command = [python, "-c", "import toytff; print(toytff.answer)"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.slow
def test_half_made_then_made_then_reused(tmp_path, cache, here, capsys):
    toy = toy_contents(tmp_path)
    with pytest.raises(RuntimeError, match=r"could not be made: pip: exit code 1\n") as caught:
        ensure(toy)
    assert "No matching distribution found for toytff==1.0" in str(caught.value)
    (folder,) = cache.iterdir()
    assert (folder / LOCK).exists()
    assert not (folder / FINISHED).exists()
    capsys.readouterr()

    (folder / "left").write_text("by the one that failed")
    toy_package(tmp_path)
    python = ensure(toy)
    assert python == folder / "bin" / "python"
    assert answer(python) == "42"
    assert not (folder / "left").exists()
    said = capsys.readouterr()
    assert f"Making the environment {folder} (a toy)" in said.err
    assert said.out == ""

    marker = (folder / FINISHED).stat().st_mtime_ns
    begin = time.perf_counter()
    assert ensure(toy, pythons=["no interpreter is started"]) == python
    assert time.perf_counter() - begin < 0.1
    assert (folder / FINISHED).stat().st_mtime_ns == marker
    assert capsys.readouterr().err == ""

    # The interpreter that it was made with is gone.
    python.unlink()
    python.symlink_to("/no/such/python")
    with pytest.raises(NoPython):
        ensure(toy, pythons=[])


@pytest.fixture(scope="module")
def named(tmp_path_factory, here):
    """A folder named by the user, made by two processes at once; and what each of them said."""
    folder = tmp_path_factory.mktemp("named")
    toy_package(folder)
    toy = toy_contents(folder)
    code = (
        "import sys; from pathlib import Path; from tff_reference.environment import *\n"
        f"print(ensure(Contents('toy', Path({str(toy.requirements)!r}), 'toytff', 0, 'a toy')))"
    )
    logs = [folder / "first.log", folder / "second.log"]
    both = []
    for log in logs:
        with log.open("w") as output:
            both.append(
                subprocess.Popen(
                    [here, "-c", code], cwd=Path(environment.__file__).parent.parent,
                    stdout=output, stderr=subprocess.STDOUT,
                    env={**os.environ, "JAXFED_TFF_ENV": str(folder / "env")},
                )
            )  # fmt: skip
    assert [process.wait() for process in both] == [0, 0]
    return toy, folder / "env", [log.read_text() for log in logs]


@pytest.mark.slow
def test_two_at_once(named):
    _, folder, said = named
    python = folder / "bin" / "python"
    assert [text.splitlines()[-1] for text in said] == [str(python)] * 2
    assert answer(python) == "42"
    text = "".join(said)
    assert text.count("Making the environment") == text.count("Made") == 1
    assert text.count("waiting for it") == 1


@pytest.mark.slow
def test_one_made_by_someone_else_is_checked_once_and_never_cleared(named, monkeypatch, capsys):
    toy, folder, _ = named
    monkeypatch.setenv("JAXFED_TFF_ENV", str(folder))
    (folder / FINISHED).unlink()
    (folder / LOCK).unlink()
    (folder / "thesis.tex").write_text("ten years of work")
    assert ensure(toy) == folder / "bin" / "python"
    assert "which was not made here" in capsys.readouterr().err
    assert ensure(toy) == folder / "bin" / "python"
    assert capsys.readouterr().err == ""

    # It holds other packages than those that are wanted now.
    with pytest.raises(RuntimeError, match=r"(?s)expected .*'1\.0', 'expected', '2\.0'"):
        ensure(toy_contents(toy.requirements.parent, "toytff==2.0"))
    assert (folder / "thesis.tex").exists()


def test_a_folder_that_is_no_environment_is_left_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXFED_TFF_ENV", str(tmp_path / "named"))
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / "thesis.tex").write_text("ten years of work")
    with pytest.raises(RuntimeError, match=r"JAXFED_TFF_ENV: got .*named, which has no bin/python"):
        ensure(toy_contents(tmp_path))
    assert [path.name for path in (tmp_path / "named").iterdir()] == ["thesis.tex"]


def test_no_suitable_python(tmp_path, cache, monkeypatch):
    """One is absent, and every one on PATH is wrong in another way."""
    says = ["echo 3.12 linux-x86_64", "echo 3.11 macosx-14-arm64", "echo no ensurepip; exit 1"]
    folders = [tmp_path / name for name in ("new", "mac", "bare")]
    for folder, line in zip(folders, says, strict=True):
        folder.mkdir()
        (folder / "python3.11").write_text(f"#!/bin/sh\n{line}\n")
        (folder / "python3.11").chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join(map(str, folders)))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "absent"))
    with pytest.raises(NoPython) as caught:
        ensure(toy_contents(tmp_path))
    for part in (
        "got ", "absent (cannot run: [Errno 2]", "new/python3.11 (3.12 linux-x86_64)",
        "mac/python3.11 (3.11 macosx-14-arm64)", "bare/python3.11 (no ensurepip)",
        "expected Python 3.11 on linux-x86_64", "install one",
    ):  # fmt: skip
        assert part in str(caught.value)
    assert not cache.exists()


def test_a_full_disk_is_told_before_anything_is_made(tmp_path, here):
    with pytest.raises(RuntimeError, match=r"GB of free disk, expected 1000000000\.0 GB; free som"):
        ensure(toy_contents(tmp_path)._replace(free_bytes=10**18))


def test_tff_is_pinned():
    lines = TFF.requirements.read_text().split()
    assert all(line.count("==") == 1 for line in lines)
    assert "tensorflow-federated==0.87.0" in lines
