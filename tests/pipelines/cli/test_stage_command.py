"""Commands are derived from option classes: flags, help, validation and errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lfm.errors import ConfigError
from pipelines.cli import model_commands
from pipelines.cli.main import COMMANDS
from pipelines.cli.stage_command import StageCommand, show, stage_command
from pipelines.common.experiment.config_file import load
from pipelines.common.options import (
    Argument,
    Count,
    Flag,
    Location,
    Positive,
    PythonOnly,
    Section,
    Seed,
    Share,
    stage_options,
)
from pipelines.common.sample_jobs.sample_options import SampleConfig
from pipelines.data.data_options import AutoencoderConfig, EncodeConfig, InspectConfig, ShardConfig
from pipelines.demo.demo_options import DemoConfig, ScenesConfig
from pipelines.doctor.doctor_options import DoctorConfig
from pipelines.evaluation.evaluation_options import EvaluateConfig, LikelihoodConfig, ReferenceConfig
from pipelines.exchange.exchange_options import ExportConfig, ImportConfig
from pipelines.monitoring.status_options import StatusConfig
from pipelines.training.training_options import EmaConfig, LaunchedTrainOptions, TrainOptions
from tests.support.commands import REPOSITORY, assert_one_line, lfm

OPTION_CLASSES = {
    "shard": ShardConfig,
    "encode": EncodeConfig,
    "inspect": InspectConfig,
    "autoencoder": AutoencoderConfig,
    "scenes": ScenesConfig,
    "reference": ReferenceConfig,
    "evaluate": EvaluateConfig,
    "likelihood": LikelihoodConfig,
    "sample": SampleConfig,
    "import": ImportConfig,
    "export": ExportConfig,
    "ema": EmaConfig,
    "demo": DemoConfig,
    "doctor": DoctorConfig,
    "status": StatusConfig,
    "train": LaunchedTrainOptions,
    "launch/train.py": TrainOptions,
}
COMMAND_OF = {command.name: command for command in COMMANDS} | {"launch/train.py": model_commands.train}


@stage_options
class ExampleConfig:
    """Options of an example."""

    source: Annotated[Location, Argument()]
    """Folder of images."""
    num: Count = 16
    """Number of images."""
    image_format: Annotated[Literal["webp", "png"], Flag("--format")] = "webp"
    """File format."""
    scales: Annotated[tuple[float, ...], Section("Guidance")] = ()
    """Guidance scales."""
    rate: Positive | None = None
    """Learning rate."""
    share: Share = 0.5
    """Share of the images."""
    seed: Seed = 0
    """Seed."""
    flips: bool = False
    """Flip images."""
    composite: bool = True
    """Replace known pixels."""
    num_jacobians: Annotated[int, PythonOnly()] = 3
    """Set by Python code only."""


def run_example(*arguments: object, error: Exception | None = None) -> tuple[ExampleConfig, Any]:
    """Return the configuration that the arguments make, and the result of the command."""
    configs: list[ExampleConfig] = []

    @stage_command(ExampleConfig)
    def example(config: ExampleConfig) -> None:
        """Run the example."""
        configs.append(config)
        if error:
            raise error

    result = CliRunner().invoke(example, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return (configs or [None])[0], result  # type: ignore[return-value]


@pytest.mark.parametrize("name", OPTION_CLASSES)
def test_the_help_names_every_field_with_its_text(name: str) -> None:
    command, fields = COMMAND_OF[name], OPTION_CLASSES[name].__pydantic_fields__  # type: ignore[attr-defined]
    text = " ".join(CliRunner().invoke(command, ["--help"]).output.split())
    parameters = {parameter.name: parameter for parameter in command.params}
    for key, field in fields.items():
        assert field.description, f"{name}: {key} has no docstring"
        if any(isinstance(marker, PythonOnly) for marker in field.metadata):
            assert key not in parameters
            continue
        parameter = parameters.pop(key)
        if not getattr(parameter, "hidden", False):
            flag = parameter.opts[0] if isinstance(parameter, click.Option) else key.upper()
            assert flag in text
            assert " ".join(field.description.split())[:30] in text.replace("- ", "-")
    assert parameters.keys() == {"quiet", "verbose"}, "an option without a field"


@pytest.mark.parametrize("name", OPTION_CLASSES)
def test_the_class_and_the_help_say_what_the_command_is_for(name: str) -> None:
    assert (OPTION_CLASSES[name].__doc__ or "").startswith("Options of `")
    assert (COMMAND_OF[name].help or "").strip().partition("\n\n")[0].endswith(".")
    assert isinstance(COMMAND_OF[name], StageCommand)


def test_every_command_answers_help() -> None:
    for name in OPTION_CLASSES.keys() - {"launch/train.py"}:
        assert lfm(name, "--help").exit_code == 0
    assert "shard" in lfm("--help").output


def test_the_help_lists_sections_choices_and_defaults() -> None:
    text = run_example("--help")[1].output
    assert "Arguments:\n  SOURCE" in text and "\nGuidance:\n" in text
    assert text.index("--num ") < text.index("Guidance:") < text.index("--rate")
    assert "--format [webp|png]" in text and "[default: webp]" in text and "[default: 0]" in text
    assert "--composite / --no-composite" in text
    assert "num-jacobians" not in text


def test_values_are_converted_once_and_defaults_are_those_of_the_class() -> None:
    assert run_example("x")[0] == ExampleConfig("x")
    given_values = ("file:///a", "--num", 3, "--format", "png", "--scales", 1, "--scales", "2.5", "--flips")
    config, _ = run_example(*given_values, "--no-composite", "--rate", "1e-3")
    assert config == ExampleConfig(
        "/a", num=3, image_format="png", scales=(1.0, 2.5), flips=True, composite=False, rate=1e-3
    )


@given(st.integers(1, 10**9), st.floats(0, 1), st.integers(0, 2**63 - 1))
def test_any_value_in_range_arrives_as_written(num: int, share: float, seed: int) -> None:
    config, _ = run_example("x", "--num", num, "--share", repr(share), "--seed", seed)
    assert (config.num, config.share, config.seed) == (num, share, seed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("",), "SOURCE : is empty; name a folder, file or URL"),
        (("x", "--num", 0), "--num 0: must be at least 1"),
        (("x", "--num", "many"), "--num many: must be a valid integer"),
        (("x", "--format", "pngg"), "--format pngg: unknown; did you mean png? one of webp, png"),
        (("x", "--scales", 1, "--scales", "a"), "--scales a: must be a valid number"),
        (("x", "--rate", 0), "--rate 0: must be greater than 0"),
        (("x", "--rate", "inf"), "--rate inf: must be a finite number"),
        (("x", "--share", 1.5), "--share 1.5: must be at most 1"),
        (("x", "--seed", 2**63), f"--seed {2**63}: must be less than {2**63}"),
        (("x", "--unknown"), "--unknown"),
        ((), "SOURCE"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_the_flag(arguments: tuple[object, ...], message: str) -> None:
    config, result = run_example(*arguments)
    assert config is None
    assert_one_line(result, message)


@pytest.mark.parametrize("name", sorted(COMMAND_OF))
def test_a_missing_argument_or_option_is_named(name: str) -> None:
    command = COMMAND_OF[name]
    required = [parameter for parameter in command.params if parameter.required]
    for missing in required:
        values: list[str] = []
        for parameter in required:
            if parameter is not missing:
                values += ["x"] if isinstance(parameter, click.Argument) else [parameter.opts[0], "x"]
        # of two arguments, click may name the other one
        label = missing.opts[0] if isinstance(missing, click.Option) else "Missing argument"
        assert_one_line(lfm(*values, command=command), "Missing", label)


@pytest.mark.parametrize("name", sorted(COMMAND_OF))
def test_an_option_takes_a_value_that_begins_with_a_minus(name: str) -> None:
    command = COMMAND_OF[name]
    for option in command.params:
        if isinstance(option, click.Option) and not option.is_flag:
            values, rest, _ = command.make_parser(click.Context(command)).parse_args([option.opts[0], "-1"])
            assert values[option.name] in ("-1", ["-1"]) and not rest


def test_option_classes_refuse_wrong_values_from_python_too() -> None:
    with pytest.raises(ValidationError, match="num"):
        ExampleConfig("x", num=0)
    with pytest.raises(ValidationError, match="unknown_option"):
        ExampleConfig("x", unknown_option=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("`num` 3: too few; raise `scales`", "--num 3: too few; raise --scales"),
        ("`image_format` x, for `source`", "--format x, for SOURCE"),
        ("`dtype` x: run `lfm encode` with `num_jacobians`", "`dtype` x: run `lfm encode` with `num_jacobians`"),
    ],
)
def test_names_of_arguments_in_errors_become_flags(message: str, line: str) -> None:
    assert_one_line(run_example("x", error=ConfigError(message))[1], f"error: {line}")


def test_an_error_of_several_lines_is_one_line() -> None:
    assert_one_line(run_example("x", error=OSError("first\n  second"))[1], "error: first second")


def test_an_interrupt_says_how_to_resume() -> None:
    _, result = run_example("x", error=KeyboardInterrupt())
    assert result.exit_code == 130 and "run the same command to resume" in result.stderr


def test_a_dry_run_shows_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    show(ExampleConfig("x"), "the plan")
    lines = capsys.readouterr().out.splitlines()
    assert "source: x" in lines and "num: 16" in lines and lines[-1] == "the plan"


def test_no_help_text_needs_torch() -> None:
    script = (
        "import sys\nfrom click.testing import CliRunner\nfrom pipelines.cli.main import COMMANDS\n"
        "codes = [CliRunner().invoke(command, ['--help']).exit_code for command in COMMANDS]\n"
        "print(codes, [name for name in ('torch', 'diffusers', 'deepspeed') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == f"{[0] * len(COMMANDS)} []"


def test_the_home_folder_is_written_as_in_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no shell replaces it: in the YAML, in --set, and in --out=~/folder; spaces may be in paths."""
    monkeypatch.setenv("HOME", str(tmp_path / "my home"))
    assert lfm("scenes", "~/drawn scenes", "--num", 2, "--image-size", 32).exit_code == 0
    assert (tmp_path / "my home" / "drawn scenes" / "images").is_dir()
    file = tmp_path / "mine.yaml"
    file.write_text(f"extends: {REPOSITORY}/configs/demo.yaml\ndata: {{shards: ~/latents}}\n")
    config = load(str(file), ("run=~/runs/mine",))
    assert (config.run, config.data.shards) == (f"{tmp_path}/my home/runs/mine", f"{tmp_path}/my home/latents")
