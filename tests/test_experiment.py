"""The config tree: JSON, flags, and what is refused before anything is compiled."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxfed.config import (
    ClientConfig,
    ConfigError,
    DataConfig,
    Experiment,
    ModelConfig,
    ServerConfig,
    dotted_keys,
    from_dict,
    from_json,
    override,
    to_dict,
    to_json,
    validate,
)
from jaxfed.data import DataError
from jaxfed.prepare import prepare
from jaxfed.train import main, parse


def test_every_field_is_documented():
    import inspect

    for part in (Experiment, DataConfig, ModelConfig, ClientConfig, ServerConfig):
        source = inspect.getsource(part)
        for item in dataclasses.fields(part):
            if not dataclasses.is_dataclass(item.type):
                after = source.split(f"    {item.name}: ", 1)[1].splitlines()[1].strip()
                assert after.startswith('"""'), item.name


experiments = st.builds(
    Experiment,
    name=st.text(max_size=8),
    seed=st.integers(0, 2**31 - 1),
    rounds=st.integers(1, 99),
    clients_per_round=st.none() | st.integers(1, 10),
    algorithm=st.sampled_from(["fedavg", "fedprox", "central"]),
    parallel=st.sampled_from(["auto", "loop", "vmap"]) | st.integers(1, 9),
    data=st.builds(DataConfig, alpha=st.floats(0.01, 10), num_clients=st.integers(10, 99)),
    model=st.builds(ModelConfig, norm=st.none() | st.sampled_from(["batch", "group"])),
    client=st.builds(ClientConfig, lr=st.floats(0, 1), batch_size=st.none() | st.integers(1, 9)),
)


@given(experiments)
def test_json_round_trip(experiment):
    validate(experiment)
    assert from_dict(json.loads(to_json(experiment))) == experiment


def test_a_file_may_leave_out_any_key(tmp_path):
    path = tmp_path / "e.json"
    path.write_text('{"rounds": 3, "client": {"lr": 1}}')
    assert from_json(path) == Experiment(rounds=3, client=ClientConfig(lr=1.0))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=2)
            | st.dictionaries(
                st.sampled_from([*to_dict(Experiment()), "lr", "x"]), inner, max_size=3
            )
        ),
    )
)
def test_arbitrary_json_is_an_experiment_or_a_clear_error(tree):
    try:
        validate(from_dict(tree))
    except ConfigError as error:
        assert "\n" not in str(error)


def test_flags_win_over_the_file(tmp_path):
    path = tmp_path / "e.json"
    path.write_text('{"rounds": 3, "client": {"lr": 0.7}}')
    flags = ["--config", str(path), "--rounds", "9", "--client.shuffle", "False"]
    experiment = parse(flags).experiment
    assert (experiment.rounds, experiment.client.lr, experiment.client.shuffle) == (9, 0.7, False)


def test_every_key_is_a_flag_and_a_sweep_key():
    values = {"int": 7, "float": 0.5, "str": "x", "bool": False}
    for key in dotted_keys():
        node = to_dict(Experiment())
        for part in key.split("."):
            node = node[part]
        if isinstance(node, bool | int | float):
            value = values[type(node).__name__]
            text = str(value)
            assert parse([f"--{key}", text]).experiment == override(Experiment(), {key: value})


# Flags, and what the one line that refuses them has to name.
REFUSED = {
    "unknown flag": (["--roundz", "3"], ["roundz"]),
    "a word for a number": (["--rounds", "many"], ["rounds"]),
    "unknown choice": (["--algorithm", "fedsomething"], ["algorithm", "fedavg"]),
    "negative rate": (["--client.lr", "-0.1"], ["client.lr", "-0.1", "0 or more"]),
    "rate not finite": (["--server.lr", "nan"], ["server.lr", "nan"]),
    "no rounds": (["--rounds", "0"], ["rounds", "1 or more"]),
    "negative seed": (["--seed", "-1"], ["seed", "0 or more"]),
    "seed too large": (["--seed", str(2**40)], ["seed", "2147483648"]),
    "cohort above population": (
        ["--clients_per_round", "20", "--data.num_clients", "10"],
        ["clients_per_round", "20", "10", "data.num_clients"],
    ),
    "cohort above default population": (["--clients_per_round", "20"], ["clients_per_round", "10"]),
    "policy without BatchNorm": (["--model.batch_stats", "mean"], ["batch_stats", "no BatchNorm"]),
    "policy with GroupNorm": (
        ["--model.norm", "group", "--model.batch_stats", "mean"], ["batch_stats", "group"],
    ),
    "MobileNet under 32 pixels": (
        ["--model.name", "mobilenet-v1", "--data.image_size", "28"], ["image_size", "28", "32"],
    ),
    "unknown model": (["--model.name", "resnet"], ["model.name", "resnet", "mobilenet-v1"]),
    "unknown dataset": (["--data.dataset", "mnits"], ["mnits"]),
    "missing file": (["--data.dataset", "nowhere.npz"], ["nowhere.npz"]),
    "unknown partition": (["--data.partition", "fair"], ["fair", "iid"]),
    "natural without clients": (["--data.partition", "natural"], ["natural", "client_train"]),
    "more clients than images": (["--data.num_clients", "5000"], ["5000"]),
    "more images than there are": (["--data.examples_per_client", "5000"], ["examples_per_client"]),
    "zero width": (["--model.width", "0"], ["model.width", "above 0"]),
    "momentum with adam": (
        ["--client.optimizer", "adam", "--client.momentum", "0.9"], ["client.momentum", "adam"],
    ),
    "momentum of one": (
        ["--server.optimizer", "momentum", "--server.momentum", "1"],
        ["server.momentum", "below 1"],
    ),
    "mu without fedprox": (["--client.prox_mu", "0.1"], ["client.mu", "fedprox"]),
    "local statistics, pooled training": (
        ["--algorithm", "central", "--model.norm", "batch", "--model.batch_stats", "local"],
        ["batch_stats", "central"],
    ),
    "uniform central": (["--algorithm", "central", "--weighting", "uniform"], ["weighting"]),
    "several epochs of fedsgd": (
        ["--algorithm", "fedsgd", "--client.epochs", "2"], ["client.epochs", "fedsgd"],
    ),
    "local statistics without local steps": (
        ["--algorithm", "fedsgd", "--model.norm", "batch", "--model.batch_stats", "local"],
        ["batch_stats", "fedsgd"],
    ),
    "no chunk": (["--parallel", "0"], ["parallel", "1 or more"]),
    "missing config": (["--config", "nowhere.json"], ["config", "nowhere.json"]),
    "resume without folder": (["--resume"], ["resume", "--out"]),
    "checkpoints without folder": (["--checkpoint_every", "2"], ["checkpoint_every", "--out"]),
    "sweep without values": (["--sweep", "client.lr"], ["sweep", "client.lr"]),
    "sweep of an unknown key": (["--sweep", "client.rate=1,2"], ["client.rate", "did you mean"]),
    "sweep of a wrong type": (["--sweep", "rounds=1,x"], ["rounds", "x"]),
    "sweep of a key twice": (["--sweep", "seed=1", "--sweep", "seed=2"], ["seed", "once"]),
    "sweep with a bad point": (["--sweep", "client.lr=0.1,-1"], ["client.lr", "-1"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line_and_exit_code_2(case, capsys):
    arguments, words = REFUSED[case]
    assert main(arguments) == 2
    message = capsys.readouterr().err.strip()
    assert "\n" not in message
    assert message.startswith("jaxfed: ")
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    "tree",
    [
        "[]",
        '{"round": 3}',
        '{"rounds": "3"}',
        '{"data": 3}',
        '{"client": {"lr": true}}',
        "{",
        "\x00",
    ],
)
def test_bad_files_are_refused_by_name(tree, tmp_path, capsys):
    path = tmp_path / "e.json"
    path.write_text(tree)
    assert main(["--config", str(path)]) == 2
    assert "\n" not in capsys.readouterr().err.strip()


def test_an_experiment_built_in_python_is_checked_too():
    with pytest.raises(ConfigError, match=r"client\.lr"):
        prepare(Experiment(client=ClientConfig(lr=-1.0)))
    with pytest.raises((ConfigError, DataError), match="partition"):
        prepare(Experiment(data=DataConfig(partition="fair")))


def test_defaults_are_filled_in_and_stand():
    task = prepare(
        Experiment(
            algorithm="fedprox",
            model=ModelConfig(norm="batch"),
            server=ServerConfig(optimizer="nesterov"),
        ),
    )
    done = task.experiment
    assert done.clients_per_round == done.data.num_clients == 10
    assert (done.model.batch_stats, done.client.mu) == ("recalibrate", 0.01)
    assert (done.server.momentum, done.client.momentum, done.client.epochs) == (0.9, None, 3)
    assert prepare(done).experiment == done
