"""Every flag takes what its type and range say, and refuses the rest in one line that suggests what is near."""

import dataclasses
import math
from typing import Literal

import pytest
import yaml

from tiny_diffusers.benchmark import Settings
from tiny_diffusers.errors import UserError
from tiny_diffusers.evaluation.report import Protocol
from tiny_diffusers.families.conditional_diffusion import ConditionalArguments
from tiny_diffusers.families.dcgan import DCGANArguments
from tiny_diffusers.families.diffusion import DiffusionArguments
from tiny_diffusers.families.pixelcnn import PixelCNNArguments
from tiny_diffusers.families.vae import VAEArguments
from tiny_diffusers.flags import FlagParser, Flags, as_flags, flag
from tiny_diffusers.resolution import Resolution, to_size


CLASSES = (
    *(DiffusionArguments, ConditionalArguments, PixelCNNArguments, VAEArguments, DCGANArguments, Settings, Protocol),
)
VALUES = ("0", "-1", "-0.5", "nan", "inf", "-inf", "99999999999999999999999")


def numeric_flags(flags_class):
    parser = FlagParser(flags_class)
    actions = {action.dest: action for action in parser._actions}
    fields = (field for field in dataclasses.fields(flags_class) if field.name in actions)
    return [field for field in fields if actions[field.name].type in (int, float)]


@pytest.mark.parametrize("flags_class", CLASSES, ids=lambda c: c.__name__)
def test_every_number_declares_its_range_and_keeps_to_it(flags_class):
    fields, parser = numeric_flags(flags_class), FlagParser(flags_class)
    assert fields
    for field in fields:
        within = field.metadata["within"]
        assert within is not None, field.name
        low, high = (float(bound) for bound in within[1:-1].split(","))
        for value in VALUES:
            number = float(value)
            inside = (low <= number if within[0] == "[" else low < number) and (
                number <= high if within[-1] == "]" else number < high
            )
            try:
                flags_class(**parser.given([f"--{field.name}={value}"]))
            except UserError as error:
                assert "\n" not in str(error) and field.name in str(error), (field.name, value)
                # a whole number may be refused for its form, and some flags have more to say
                assert not inside or not math.isfinite(number) or isinstance(number, float)
            else:
                assert inside, (field.name, value)


@dataclasses.dataclass(frozen=True)
class Example(Flags):
    seed: int = flag(0, "Seed.", within="[0, inf)")
    share: float = flag(0.5, "Share.", within="(0, 1]")
    weight: float = flag(1.0, "Weight.", within="(-inf, inf)")
    kind: Literal["small", "large"] = flag("small", "Kind.")
    kinds: list[Literal["none", "full"]] | None = flag(None, "Kinds.")
    widths: list[int] | None = flag(None, "Widths.", within="[1, inf)")
    use_ema: bool = flag(True, "EMA.")
    resolution: Resolution | None = flag(None, "Resolution.", within="[1, 1024]")
    note: str = dataclasses.field(default="")  # no flag


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--seed -1", "--seed -1: it must be a whole number of at least 0."),
        ("--share 0", "--share 0.0: it must be in (0, 1]."),
        ("--weight nan", "--weight nan: it must be a finite number."),
        ("--widths 8 0", "--widths 0: it must be a whole number of at least 1."),
        ("--kind smal", "Unknown --kind 'smal': it must be one of small, large. Did you mean 'small'?"),
        ("--kinds none,ful", "Unknown --kinds 'ful': it must be one of none, full. Did you mean 'full'?"),
        ("--resolution 48x", "'48x' must be a side in pixels, as 32, or height x width, as 48x64"),
        ("--resolution 48x64x3", "'48x64x3' must be a side"),
        ("--resolution 32.5", "'32.5' must be a side"),
        ("--resolution 0", "--resolution 0: it must be in [1, 1024]."),
        ("--resolution 0x8", "--resolution 0x8: both sides must be in [1, 1024]."),
        ("--resolution 8x-1", "--resolution 8x-1: both sides must be in [1, 1024]."),
        ("--resolution 8x99999999999999999999", "both sides must be in [1, 1024]."),
        ("--sed 1", "Unknown argument '--sed'. Did you mean '--seed'"),
        ("--note x", "Unknown argument '--note'"),
        ("--seed x", "--seed"),
        ("stray", "'stray' is an argument too many"),
    ],
)
def test_a_mistake_is_one_line(argv, words):
    with pytest.raises(UserError) as error:
        Example(**FlagParser(Example).given(argv.split()))
    assert str(error.value).startswith(words) or words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "resolution", "size"), [("32", 32, 32), ("32x32", 32, 32), ("48x64", "48x64", (48, 64))]
)
def test_a_resolution_is_a_side_or_height_x_width_and_has_one_spelling(text, resolution, size):
    parser = FlagParser(Example)
    given = parser.given(["--resolution", text])
    assert given == {"resolution": resolution} and to_size(resolution) == size
    assert parser.given(as_flags(given)) == parser.given(as_flags(yaml.safe_load(yaml.safe_dump(given)))) == given


def test_lists_are_split_at_spaces_and_commas_and_only_what_is_given_is_returned():
    given = FlagParser(Example).given("--kinds none,full none --widths 8 16 --no_use_ema".split())
    assert given == {"kinds": ["none", "full", "none"], "widths": [8, 16], "use_ema": False}


def test_help_shows_defaults_but_no_none(capsys):
    with pytest.raises(SystemExit, match="0"):
        FlagParser(Example).parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Seed. (default: 0)" in text and "None" not in text
    assert "--no_use_ema Turn --use_ema off." in text and "--no-use-ema" not in text  # one spelling of the two


@pytest.mark.parametrize("limits", [["-1e3", "1e3"], ["-1e-05", "1"], ["-1.5E+2", "-.5"]])
def test_negative_numbers_with_exponents_are_values(limits):
    for args in (["--value_range", *limits], as_flags({"value_range": [float(limit) for limit in limits]})):
        assert [*map(float, FlagParser(DiffusionArguments).given(args)["value_range"])] == [*map(float, limits)]
    with pytest.raises(UserError, match="expected at least one argument"):
        FlagParser(DiffusionArguments).given(["--value_range", "-1e", "1"])
