"""Words everybody shares: errors, scales, configs."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from varcli import config as configs
from varcli.errors import ConfigError, unknown_name
from varcli.progress import counted
from varcli.scales import NAMED_SCHEDULES, PatchNums


@dataclass(frozen=True, kw_only=True)
class Inner:
    """A nested config."""

    rate: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Outer:
    """A config with every kind of field."""

    steps: int = 10
    clip: float | None = 2.0
    sides: tuple[int, ...] = (1, 2)
    name: str = "x"
    inner: Inner = Inner()


def test_token_counts_of_the_published_schedules():
    counts = {name: PatchNums(sides).seq_len for name, sides in NAMED_SCHEDULES.items()}
    assert counts == {"256": 680, "512": 2240, "1024": 9451}


@pytest.mark.parametrize("sides", [(), (0, 1), (4, 2)])
def test_schedules_that_cannot_work_are_refused(sides):
    with pytest.raises(ConfigError, match="patch_nums"):
        PatchNums(sides)


def test_schedules_parse_from_text():
    assert PatchNums.parse("512").grid_side == 32
    assert PatchNums.parse("1, 2,3").sides == (1, 2, 3)
    with pytest.raises(ConfigError):
        PatchNums.parse("1,two")


def test_a_config_survives_its_json_form():
    config = Outer(steps=3, clip=None, sides=(1, 4), inner=Inner(rate=0.5))
    assert configs.from_dict(Outer, configs.to_dict(config)) == config


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(ConfigError, match="stesp") as caught:
        configs.from_dict(Outer, {"stesp": 3})
    assert "steps" in caught.value.hint


@pytest.mark.parametrize("values", [{"steps": "many"}, {"steps": True}, {"sides": {}}, {"clip": "x"}])
def test_a_value_of_the_wrong_type_is_refused(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        configs.from_dict(Outer, values)


def test_assignments_read_as_toml_and_none():
    pairs = ["steps=5", "clip=none", "sides=[1,3]", "name=my run"]
    config = configs.replace(Outer(), configs.parse_assignments(pairs))
    assert config == Outer(steps=5, clip=None, sides=(1, 3), name="my run")


@pytest.mark.parametrize(
    ("text", "sides"), [("1,2,4", (1, 2, 4)), ("[1, 2, 4]", (1, 2, 4)), ("4", (4,)), ("1, 2", (1, 2))]
)
def test_numbers_may_be_separated_by_commas(text, sides):
    assert configs.replace(Outer(), configs.parse_assignments([f"sides={text}"])).sides == sides


@pytest.mark.parametrize("text", ["1,two", "1.5", "1,2.5", "true"])
def test_what_a_list_of_numbers_takes_is_said_by_example(text):
    with pytest.raises(ConfigError, match="`sides` takes whole numbers such as 1,2,4, but got"):
        configs.replace(Outer(), configs.parse_assignments([f"sides={text}"]))


def test_an_unknown_name_lists_the_closest():
    error = unknown_name("class", "golden retriver", [f"class {i}" for i in range(50)] + ["golden retriever"])
    assert "golden retriever" in error.hint


def test_settings_that_differ_are_told_with_what_they_were_and_are():
    before = {
        "steps": 8,
        "tokenizer": {"width": 32},
        "sides": [1, 2],
        "model": "3fa1c2" * 4,
        "names": ["a name "] * 9,
        "old": 1,
    }
    now = {"steps": 9, "tokenizer": {"width": 64}, "sides": (1, 3), "model": "91be07" * 4, "names": ["b"], "new": None}
    told = configs.differences(before, now)
    assert list(told.values()) == [
        "steps was 8, now 9",
        "tokenizer.width was 32, now 64",
        "sides was 1,2, now 1,3",
        "model was 3fa1c2, now 91be07",
        "other names",
    ]
    assert configs.differences(before, now, is_strict=True) == {**told, "old": "old was 1, now none"}
    assert configs.differences(now, now, is_strict=True) == {}


def test_one_thing_is_counted_without_a_plural():
    assert [counted(count, "row") for count in (0, 1, 1024)] == ["0 rows", "1 row", "1,024 rows"]
    assert [counted(count, "class", "classes") for count in (1, 2)] == ["1 class", "2 classes"]
