"""Settings: precedence, conversion, and what each mistake prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
import pytest

from shared.config import BrokerConfig, broker_flags, load
from shared.errors import UserError


class Training(msgspec.Struct, frozen=True):
    eps: float = 1e-3
    dtype: Literal["bf16", "fp32"] = "bf16"
    data: Path | None = None
    labels: tuple[str, ...] = ()
    steps: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 10


class Agent(msgspec.Struct, frozen=True):
    run: str
    broker: BrokerConfig = msgspec.field(default_factory=BrokerConfig)
    training: Training = Training()
    verbose: bool = False


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "kseed.toml"
    file.write_text(text)
    return file


def refusal(**arguments: object) -> str:
    defaults: dict[str, object] = {"env": {}, "flags": {"run": "r"}}
    with pytest.raises(UserError) as caught:
        load(Agent, **{**defaults, **arguments})  # type: ignore[arg-type]
    return str(caught.value)


def test_flags_win_over_environment_over_file_over_default(tmp_path: Path) -> None:
    file = written(tmp_path, 'run = "f"\n[training]\neps = 1.0\nsteps = 1\ndtype = "fp32"\n')
    config = load(
        Agent,
        file=file,
        env={"KSEED_TRAINING_EPS": "2.0", "KSEED_TRAINING_STEPS": "2", "HOME": "/"},
        flags={"training.eps": 3.0, "training.steps": None},
    )
    assert config.training == Training(eps=3.0, steps=2, dtype="fp32")
    assert config.run == "f"
    assert config.broker == BrokerConfig()


def test_environment_text_becomes_numbers_lists_and_truth() -> None:
    env = {"KSEED_TRAINING_LABELS": "good, bad", "KSEED_VERBOSE": "true", "KSEED_BROKER_KEEPALIVE_S": "60"}
    config = load(Agent, env=env, flags={"run": "r"})
    assert config.training.labels == ("good", "bad")
    assert config.verbose is True
    assert config.broker.keepalive_s == 60


def test_relative_path_in_a_file_starts_at_the_file(tmp_path: Path) -> None:
    config = load(Agent, file=written(tmp_path, '[training]\ndata = "d.jsonl"\n'), env={}, flags={"run": "r"})
    assert config.training.data == tmp_path / "d.jsonl"
    assert load(Agent, env={}, flags={"run": "r", "training.data": "d.jsonl"}).training.data == Path("d.jsonl")


def test_unknown_key_in_file_names_file_key_and_nearest(tmp_path: Path) -> None:
    file = written(tmp_path, "[training]\nepps = 1.0\n")
    assert refusal(file=file) == f"{file}: unknown key 'training.epps'; did you mean 'training.eps'?"


def test_unknown_section_names_the_nearest(tmp_path: Path) -> None:
    file = written(tmp_path, "[brokr]\nhost = 'x'\n")
    assert refusal(file=file) == f"{file}: unknown section [brokr]; did you mean 'broker'?"


def test_unknown_environment_variable_names_the_nearest() -> None:
    message = refusal(env={"KSEED_BROKER_HOTS": "x"})
    assert message == "environment: unknown variable KSEED_BROKER_HOTS; did you mean 'KSEED_BROKER_HOST'?"


def test_unknown_flag_names_the_nearest() -> None:
    assert refusal(flags={"run": "r", "broker.prt": 1}) == (
        "command line: unknown key 'broker.prt'; did you mean 'broker.port'?"
    )


def test_key_that_resembles_nothing_lists_what_is_known(tmp_path: Path) -> None:
    message = refusal(file=written(tmp_path, "zzzzzzzzzzzz = 1\n"))
    assert "known are broker.ca_file, broker.cert_file" in message
    assert message.endswith("verbose. Remove it.")


def test_sections_of_another_program_are_skipped(tmp_path: Path) -> None:
    file = written(tmp_path, "[aggregator]\nx = 1\n")
    config = load(Agent, file=file, env={"KSEED_AGGREGATOR_X": "1"}, flags={"run": "r"}, other_sections=["aggregator"])
    assert config == Agent(run="r")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[training]\neps = 'big'\n", "training.eps is 'big'; expected `float`, got `str`. Correct the value."),
        ("[training]\nsteps = 0\n", "training.steps is 0; expected `int` >= 1. Correct the value."),
        ("[training]\ndtype = 'fp8'\n", "training.dtype is 'fp8'; invalid enum value 'fp8'. Correct the value."),
        ("[training]\ndata = 3\n", "training.data is 3; "),
        ("training = 3\n", "training is 3; it must be a section, written [training]."),
        ("[training\n", "not valid TOML: "),
    ],
)
def test_wrong_value_names_file_key_got_and_allowed(tmp_path: Path, text: str, expected: str) -> None:
    file = written(tmp_path, text)
    assert refusal(file=file).startswith(f"{file}: {expected}")


def test_a_number_in_the_file_must_not_be_a_string_but_in_the_environment_it_is(tmp_path: Path) -> None:
    assert load(Agent, env={"KSEED_TRAINING_STEPS": "7"}, flags={"run": "r"}).training.steps == 7
    assert "expected `int`, got `str`" in refusal(file=written(tmp_path, "[training]\nsteps = '7'\n"))
    message = refusal(env={"KSEED_TRAINING_STEPS": "seven"})
    assert message.startswith("environment variable KSEED_TRAINING_STEPS: training.steps is 'seven'; expected `int`")


def test_missing_key_says_the_three_ways_to_give_it() -> None:
    assert refusal(flags={}) == (
        "run is missing and has no default; give it as a flag, as KSEED_RUN, or as run in the configuration file."
    )


def test_missing_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "no.toml"
    assert refusal(file=file) == (
        f"{file}: cannot read the configuration file: No such file or directory. Check the path."
    )


def test_broker_port_follows_tls_unless_given() -> None:
    assert BrokerConfig().port == 1883
    assert BrokerConfig(tls=True).port == 8883
    assert BrokerConfig(tls=True, port=1).port == 1


def test_broker_refuses_values_that_cannot_work_together(tmp_path: Path) -> None:
    there = tmp_path / "f.pem"
    there.write_text("x")
    mistakes: list[tuple[dict[str, object], str]] = [
        ({"port": 65536}, "port is 65536; allowed are 1 to 65535"),
        ({"host": "mqtt://x"}, "host is 'mqtt://x'; give a name or an address alone"),
        ({"keepalive_s": 0}, "keepalive_s is 0; allowed are 1 to 65535 seconds"),
        ({"reconnect_longest_s": 0.5}, "reconnect_longest_s is 0.5; allowed are 1 to 3600 seconds"),
        ({"ca_file": there}, "ca_file is given but tls is off"),
        ({"tls": True, "cert_file": there}, "cert_file is given without key_file"),
        ({"tls": True, "key_file": there}, "key_file is given without cert_file"),
        ({"password_file": there}, "password_file is given without username"),
        ({"tls": True, "ca_file": tmp_path / "no.pem"}, f"ca_file is '{tmp_path}/no.pem'; there is no such file"),
    ]
    for arguments, expected in mistakes:
        with pytest.raises(UserError) as caught:
            BrokerConfig(**arguments)  # type: ignore[arg-type]
        assert str(caught.value).startswith(expected)


def test_broker_mistake_names_its_place_and_section() -> None:
    assert refusal(flags={"run": "r", "broker.port": 70000}).startswith("command line: [broker] port is 70000;")


def test_password_is_the_first_line_of_its_file(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("s3cret\r\nsecond\n")
    assert BrokerConfig(username="u", password_file=file).password() == "s3cret"
    assert BrokerConfig().password() is None


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("example.org", "example.org", None),
        ("example.org:1884", "example.org", 1884),
        ("[::1]", "::1", None),
        ("[::1]:1884", "::1", 1884),
    ],
)
def test_a_broker_is_a_host_and_perhaps_a_port(text: str, host: str, port: int | None) -> None:
    assert broker_flags(text) == {"broker.host": host, "broker.port": port}


@pytest.mark.parametrize("text", ["host:", "host:port", "host:-1", "host:①", ":"])
def test_a_broker_with_a_bad_port_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="give host or host:port"):
        broker_flags(text)
