from __future__ import annotations

import pytest
from pydantic import Field

from medssl.config import Config, apply_overrides, dump_yaml, load_yaml, parse_yaml
from medssl.errors import ConfigError


class Inner(Config):
    rate: float = 0.1


class Outer(Config):
    steps: int = Field(10, ge=1)
    window: tuple[int, int, int] = (1, 2, 3)
    inner: Inner = Inner()
    maybe: Inner | None = None


def test_yaml_lists_become_tuples_and_integers_serve_as_floats():
    config = Outer.parse({"window": [4, 5, 6], "inner": {"rate": 1}})
    assert config.window == (4, 5, 6)
    assert config.inner.rate == 1.0
    assert Outer.parse(config.to_dict()) == config


@pytest.mark.parametrize(
    ("mapping", "sentence"),
    [
        ({"step": 3}, "x.yaml: unknown key step. Did you mean steps?"),
        ({"inner": {"rat": 3}}, "x.yaml: unknown key inner.rat. Did you mean rate?"),
        ({"maybe": {"zzz": 3}}, "x.yaml: unknown key maybe.zzz. Known keys: rate."),
        ({"steps": "3"}, "x.yaml: steps: Input should be a valid integer (found '3')."),
        ({"steps": 2.5}, "x.yaml: steps: Input should be a valid integer"),
        ({"steps": True}, "x.yaml: steps: Input should be a valid integer (found True)."),
        ({"steps": 0}, "x.yaml: steps: Input should be greater than or equal to 1 (found 0)."),
        ({"window": [1, 2]}, "x.yaml: window.2 is missing"),
        ({"steps": object()}, "only text, numbers, lists and mappings"),
    ],
)
def test_each_fault_is_one_line_that_names_file_key_and_remedy(mapping, sentence):
    with pytest.raises(ConfigError) as caught:
        Outer.parse(mapping, source="x.yaml")
    assert sentence in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_two_faults_give_two_lines():
    with pytest.raises(ConfigError) as caught:
        Outer.parse({"steps": "a", "nope": 1})
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", "+1e-3", ".1e-2"])
def test_every_spelling_of_a_float_reads_as_a_number(text):
    assert parse_yaml(f"rate: {text}", source="x")["rate"] == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("a: !!python/object/apply:os.system [echo]", "not valid YAML"),
        ("a: &x 1\nb: *x", "alias *x"),
        ("a: 1\na: 2", "given twice"),
        ("1: 2", "is not text"),
        ("- 1", "holds a list"),
        ("a: [", "not valid YAML"),
        ("a: " + "[" * 40 + "]" * 40, "nested deeper"),
    ],
)
def test_yaml_that_could_run_code_or_hide_a_value_is_refused(text, fragment):
    with pytest.raises(ConfigError, match=r"x") as caught:
        parse_yaml(text, source="x")
    assert fragment in str(caught.value)


def test_a_huge_a_missing_and_a_binary_file_are_refused(tmp_path):
    big = tmp_path / "big.yaml"
    big.write_bytes(b"#" * 1_000_001)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"a: \xff\xfe")
    for path, word in ((big, "at most"), (tmp_path / "none.yaml", "cannot be read"), (binary, "UTF-8")):
        with pytest.raises(ConfigError, match=word):
            load_yaml(path)


def test_an_empty_file_is_an_empty_mapping(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n")
    assert load_yaml(path) == {}


def test_overrides_reach_nested_keys_and_leave_the_original_alone():
    original = {"train": {"steps": 1}, "seed": 0}
    result = apply_overrides(original, ["train.steps=20", "train.lr=1e-3", "new.list=[1, 2]", "name=voco"])
    assert result == {"train": {"steps": 20, "lr": 1e-3}, "seed": 0, "new": {"list": [1, 2]}, "name": "voco"}
    assert original == {"train": {"steps": 1}, "seed": 0}


@pytest.mark.parametrize("override", ["train.steps", "=3", "seed.deep=1", "a=[1"])
def test_a_broken_override_is_refused(override):
    with pytest.raises(ConfigError):
        apply_overrides({"seed": 0}, [override])


@pytest.mark.parametrize(
    ("override", "instead"),
    [
        ("method.augment.preset=mr_brain", "--set 'method.augment={preset: mr_brain}'."),
        ("method.augment.noise.sigma=[0, 0.1]", "--set 'method.augment={noise: {sigma: [0, 0.1]}}'."),
        ("method.augment.0.p=0.5", "--set 'method.augment=[...]'."),
    ],
)
def test_an_override_within_a_list_is_refused_with_what_to_write_instead(override, instead):
    recipe = {"method": {"augment": [{"name": "noise"}]}}
    with pytest.raises(ConfigError) as caught:
        apply_overrides(recipe, [override])
    assert "augment is a list, which is given as a whole" in str(caught.value)
    assert str(caught.value).endswith(instead)
    if "..." not in instead:
        apply_overrides(recipe, [instead.removeprefix("--set '").removesuffix("'.")])


def test_a_dumped_mapping_reads_back_equal(tmp_path):
    mapping = {"b": 1e-05, "a": [1, {"c": None}], "t": "on"}
    path = tmp_path / "dump.yaml"
    path.write_text(dump_yaml(mapping))
    assert load_yaml(path) == mapping
