"""The process that serves cases: every way it can end, and that nothing is left of it."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tff_reference.process import ROOT, CaseRefused, Worker, WorkerError

TOY = "parity_tests.serving:toy"


def make_case(tmp_path, name):
    (tmp_path / name).mkdir()
    return tmp_path / name


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
    return value


def pids_of(case):
    """Of the worker and of what it has started, once the case has come that far."""
    until((case / "pids").exists, seconds=200)
    return [int(pid) for pid in (case / "pids").read_text().split()]


def lives(pid):
    """Any thread of it: the first may be dead while others still end, and then nobody is told."""
    try:
        stats = [(task / "stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    except (FileNotFoundError, ProcessLookupError):  # one of them ended just now
        return Path(f"/proc/{pid}").exists()
    return any(stat.rpartition(")")[2].split()[0] not in "ZX" for stat in stats)


def assert_gone(pids):
    until(lambda: not any(map(lives, pids)), seconds=5)


@pytest.fixture
def worker(tmp_path):
    with Worker(Path(sys.executable), tmp_path / "logs", run=TOY) as worker:
        yield worker


def test_many_cases_one_process(tmp_path, worker):
    cases = [make_case(tmp_path, f"good-{i}") for i in range(3)]
    for case in cases:
        (case / "reply.json").write_text("left by an earlier run")
        worker.ask(case)
    pids = [pids_of(case) for case in cases]
    assert len({own for own, _ in pids}) == 1
    assert lives(pids[0][0])
    assert [path.name for path in cases[0].iterdir()] == ["pids"]
    worker.close()
    assert_gone([pid for both in pids for pid in both])


def test_an_exception_and_a_refusal_leave_it_serving(tmp_path, worker):
    bad, refused, good = (make_case(tmp_path, name) for name in ("raise-1", "refuse-2", "good-3"))
    with pytest.raises(WorkerError, match="case raise-1: ValueError: three is not four") as caught:
        worker.ask(bad)
    assert not isinstance(caught.value, CaseRefused)
    assert "Traceback" in str(caught.value)
    with pytest.raises(CaseRefused, match="case refuse-2: NotExpressible: TFF has no such opt"):
        worker.ask(refused)
    worker.ask(good)
    assert pids_of(bad)[0] == pids_of(refused)[0] == pids_of(good)[0]


@pytest.mark.parametrize(
    ("name", "deadline", "what"),
    [
        ("hang-1", 0.3, "not done after 0.3 s"),
        ("exit-1", 20, "ended by itself with exit code 7"),
        ("segfault-1", 20, "killed by SIGSEGV"),
    ],
)
def test_a_death_is_told_and_the_next_case_runs(tmp_path, worker, name, deadline, what):
    worker.ask(make_case(tmp_path, "good-0"))
    bad, good = make_case(tmp_path, name), make_case(tmp_path, "good-2")
    with pytest.raises(WorkerError, match=f"case {name}: .*{what}") as caught:
        worker.ask(bad, deadline=deadline)
    expected = {"hang-1": "going to hang", "exit-1": "about to leave", "segfault-1": "Segmentation"}
    assert expected[name] in str(caught.value)  # the end of its log
    assert ("serving.py" in str(caught.value)) == (name != "exit-1")  # and where it was
    assert_gone(pids_of(bad))
    worker.ask(good)
    assert pids_of(good)[0] != pids_of(bad)[0]


def test_killed_from_outside(tmp_path, worker):
    bad = make_case(tmp_path, "hang-1")
    killer = threading.Thread(target=lambda: os.kill(pids_of(bad)[0], signal.SIGKILL))
    killer.start()
    with pytest.raises(WorkerError, match=r"killed by SIGKILL, as .* when memory runs out"):
        worker.ask(bad)
    killer.join()
    assert_gone(pids_of(bad))


def test_killed_between_two_cases(tmp_path, worker):
    first, second = make_case(tmp_path, "good-1"), make_case(tmp_path, "good-2")
    worker.ask(first)
    os.kill(pids_of(first)[0], signal.SIGKILL)
    until(lambda: not lives(pids_of(first)[0]))
    worker.ask(second)
    assert_gone(pids_of(first))


def test_an_interrupt_ends_it(tmp_path, worker):
    case = make_case(tmp_path, "hang-1")

    def interrupt():
        pids_of(case)
        os.kill(os.getpid(), signal.SIGINT)

    # A shell starts what runs in its background with interrupts ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            worker.ask(case)
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    assert_gone(pids_of(case))


def test_nobody_reads_the_requests_but_the_worker(tmp_path, worker):
    worker.ask(make_case(tmp_path, "stdin-1"), deadline=20)
    worker.ask(make_case(tmp_path, "good-2"))


def test_it_cannot_start(tmp_path):
    case = make_case(tmp_path, "good-1")
    with (
        Worker(Path(sys.executable), tmp_path / "logs", run="no_such_module:run") as worker,
        pytest.raises(WorkerError, match=r"case good-1, before it was begun: .* exit code 1") as no,
    ):
        worker.ask(case)
    assert "No module named 'no_such_module'" in str(no.value)
    with (
        Worker(Path(sys.executable), tmp_path / "logs", TOY, start_deadline=0.0) as worker,
        pytest.raises(WorkerError, match=r"before it was begun: .* not done after 0 s"),
    ):
        worker.ask(case)


def test_the_host_is_killed(tmp_path):
    """By SIGKILL, in the middle of a case: the worker sees its stdin end."""
    case = make_case(tmp_path, "hang-1")
    script = (
        "import sys; from pathlib import Path; from tff_reference.process import Worker\n"
        f"Worker(Path(sys.executable), Path({str(tmp_path)!r}), {TOY!r}).ask(Path({str(case)!r}))"
    )
    host = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    pids = pids_of(case)
    assert all(map(lives, pids))
    host.kill()
    host.wait()
    assert_gone(pids)


def test_it_wants_a_group_of_its_own(tmp_path):
    command = [sys.executable, "-m", "tff_reference.worker", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "expected one of its own" in done.stderr


def test_variables_of_the_host_do_not_reach_tff(tmp_path, monkeypatch):
    """TFF's old XLA would abort on the first, and its imports would fail on the second."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_of_the_future")
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with Worker(Path(sys.executable), tmp_path / "logs", TOY) as worker:
        case = make_case(tmp_path, "good-1")
        worker.ask(case)
        block = Path(f"/proc/{pids_of(case)[0]}/environ").read_bytes().decode().split("\0")
    given = dict(entry.split("=", 1) for entry in block if entry)
    assert not {"XLA_FLAGS", "PYTHONWARNINGS"} & set(given)
    assert (given["CUDA_VISIBLE_DEVICES"], given["PYTHONPATH"]) == ("", str(ROOT))


def marked(mark):
    """The pids whose variables hold `mark`: children, whatever their session and their group."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            block = (folder / "environ").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if mark.encode() in block and lives(int(folder.name)):
            found.add(int(folder.name))
    return found


def commands_of(pids):
    return {Path(f"/proc/{pid}/exe").readlink().name for pid in pids}


@pytest.mark.slow
def test_tff_leaves_nothing(tmp_path, tff_python, monkeypatch):
    """Real TFF: killed in the middle of a case, then ended as usual; its worker_binary, too."""
    mark = f"MARK_OF_THIS_TEST={tmp_path}"
    monkeypatch.setenv(*mark.split("="))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody: it must not be asked
    with Worker(tff_python, tmp_path / "logs", run="parity_tests.serving:tff") as worker:
        bad, good = make_case(tmp_path, "hang-1"), make_case(tmp_path, "good-2")
        seen = []

        def kill():
            (own,) = pids_of(bad)
            seen.append(commands_of(marked(mark)))
            os.kill(own, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(WorkerError, match=r"case hang-1: .* killed by SIGKILL"):
            worker.ask(bad)
        killer.join()
        assert "worker_binary" in seen[0]
        until(lambda: not marked(mark), seconds=5)

        worker.ask(good)
        assert "worker_binary" in commands_of(marked(mark))
    until(lambda: not marked(mark), seconds=5)
