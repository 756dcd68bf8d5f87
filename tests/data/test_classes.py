"""Names to numbers and back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import varcli
from varcli.data.classes import ClassNames, imagenet_names
from varcli.errors import DataError


def test_names_numbers_cases_and_synonyms_resolve():
    names = ClassNames(["Food & Drink", "goldfinch, Carduelis carduelis", "cat"])
    assert names.resolve("food & drink") == 0
    assert names.resolve(" carduelis CARDUELIS ") == 1
    assert names.resolve("2") == names.resolve(2) == names.resolve("cat") == 2
    assert names.label(0) == "Food & Drink"
    assert list(names) == list(names.names)


def test_a_name_that_is_a_number_is_the_name():
    assert ClassNames(["1", "0"]).resolve("0") == 1


def test_an_exact_name_wins_over_case():
    assert ClassNames(["Cardigan", "cardigan"]).resolve("cardigan") == 1


def test_a_name_of_several_classes_lists_them():
    with pytest.raises(DataError, match="0, 2"):
        ClassNames(["Crane", "boat", "crane, machine"][:2] + ["CRANE"]).resolve("crane")


def test_unknown_names_show_the_closest():
    with pytest.raises(DataError, match="unknown class `flaggs`") as caught:
        ClassNames(["Flags", "Food", "People"]).resolve("flaggs")
    assert "Flags" in caught.value.hint


@pytest.mark.parametrize("number", ["207", 207, -1, "-1"])
def test_a_number_outside_the_classes_shows_the_range(number):
    with pytest.raises(DataError, match="0 to 9") as caught:
        ClassNames([f"class {index}" for index in range(10)]).resolve(number)
    assert "3 class 3" in caught.value.hint


def test_a_thousand_unnamed_classes_are_imagenet():
    names = ClassNames.of(None, 1000)
    assert names.resolve("golden retriever") == names.resolve("Golden Retriever") == 207
    assert ClassNames.of([], 3).names == ("0", "1", "2")


def test_imagenets_names_are_torchvisions_and_need_not_all_of_it(monkeypatch):
    from torchvision.models import ResNet18_Weights

    wanted = tuple(ResNet18_Weights.DEFAULT.meta["categories"])
    assert imagenet_names() == wanted
    code = "import sys, varcli.data.classes as it; it.imagenet_names(); sys.exit('torchvision' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(varcli.__file__).parents[1], check=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # where the list is elsewhere
    assert imagenet_names() == wanted


def test_a_thousand_wordnet_ids_answer_to_imagenet_names():
    names = ClassNames([f"n{number:08d}" for number in range(1000)])
    assert names.resolve("golden retriever") == 207
    assert names.resolve("n00000207") == 207
    assert names.label(207) == "golden retriever"


def test_where_numbers_are_names_another_number_is_no_class():
    classes = ClassNames(("0", "1", "10", "2"))
    assert classes.resolve("2") == 3 and classes.resolve(3) == 3
    with pytest.raises(DataError, match="unknown class"):
        classes.resolve("3")
