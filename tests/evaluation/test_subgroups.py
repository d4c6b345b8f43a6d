"""Groups of cases: bands with stated edges, values not stated, few subjects, and faults of the tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from medssl.errors import CaseError, ConfigError, ReadError
from medssl.evaluation.subgroups import NOT_STATED, by_group, groups_of, read_facts


def facts(**columns: list[str]) -> pd.DataFrame:
    length = len(next(iter(columns.values())))
    return pd.DataFrame(columns, index=pd.Index([f"c{index}" for index in range(length)], name="case_id"))


def names(table: pd.DataFrame, column: str, **options: object) -> list[str]:
    ids = options.pop("case_ids", list(table.index))
    return groups_of(table, [column], case_ids=ids, **options)[column].tolist()  # type: ignore[arg-type]


def test_texts_are_groups_and_what_is_missing_is_a_group_of_its_own() -> None:
    table = facts(site=["A", " B ", "", "n/a", "A"])
    found = names(table, "site", case_ids=["c0", "c1", "c2", "c3", "unknown case"])
    assert found == ["A", "B", NOT_STATED, NOT_STATED, NOT_STATED]


def test_numbers_are_cut_at_their_quartiles_and_the_name_states_the_edges() -> None:
    ages = [20, 30, 40, 50, 60, 70, 80, 100]
    found = names(facts(age=[*map(str, ages), "unknown"]), "age")
    edges = np.quantile(ages, (0, 0.25, 0.5, 0.75, 1))
    expected = [f"[{edges[k]:g}, {edges[k + 1]:g}{']' if k == 3 else ')'}" for k in (0, 0, 1, 1, 2, 2, 3, 3)]
    assert found == [*expected, NOT_STATED]


def test_bands_of_large_numbers_keep_names_of_their_own() -> None:
    dates = [20200101 + step for step in range(8)]
    found = names(facts(date=list(map(str, dates))), "date")
    assert len(set(found)) == 4
    assert found[-1] == "[20200106.25, 20200108]"


def test_few_different_numbers_are_names_unless_bands_are_asked_for() -> None:
    table = facts(sex=["0", "1", "0"], age=["19", "20", "61"])
    assert names(table, "sex") == ["0", "1", "0"]
    assert names(table, "age", bands={"age": 20.0}) == ["[0, 20)", "[20, 40)", "[60, 80]"]
    assert names(table, "age", bands={"age": (20.0, 40.0, 60.0)}) == ["below 20", "[20, 40)", "above 60"]
    assert names(facts(age=["20", "60"]), "age", bands={"age": (20.0, 60.0)}) == ["[20, 60]", "[20, 60]"]
    assert names(facts(age=["", ""]), "age", bands={"age": 10.0}) == [NOT_STATED, NOT_STATED]


@pytest.mark.parametrize("bands", [(5.0,), (5.0, 5.0), (9.0, 1.0), 0.0, -1.0])
def test_bands_that_do_not_rise_are_refused(bands: float | tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match=r"bands\.age"):
        names(facts(age=["1", "2"]), "age", bands={"age": bands})


def test_bands_need_numbers_and_columns_must_be_there() -> None:
    with pytest.raises(CaseError, match="of case c1 is 'old'") as error:
        names(facts(age=["1", "old"]), "age", bands={"age": 5.0})
    assert error.value.code == "E_TABLE"
    with pytest.raises(ConfigError, match="no column site in the table of facts; it has age"):
        names(facts(age=["1"]), "site")


def test_the_same_measure_is_taken_in_every_group_and_small_groups_are_marked() -> None:
    rows = [{"case_id": f"c{i}", "subject_id": f"s{i // 2}", "x": float(i)} for i in range(14)]
    table = pd.DataFrame(rows)
    ages = [*(["90"] * 10), "5", "5", "", "100"]
    groups = groups_of(facts(age=ages), ["age"], case_ids=list(table["case_id"]), bands={"age": (50.0, 99.0)})
    found = by_group(table, groups, measure=lambda part: pd.DataFrame({"metric": ["x"], "mean": [part["x"].mean()]}))
    assert found["group"].tolist() == ["below 50", "[50, 99]", "above 99", NOT_STATED]
    assert found["mean"].tolist() == [10.5, 4.5, 13.0, 12.0]
    assert found["group_cases"].tolist() == [2, 10, 1, 1]
    assert found["group_subjects"].tolist() == [1, 5, 1, 1]
    assert found["few"].tolist() == ["few", "", "few", "few"]
    assert found["column"].unique().tolist() == ["age"]
    assert by_group(table, pd.DataFrame(), measure=lambda part: part).empty


def test_names_that_begin_like_bands_are_sorted_as_names() -> None:
    table = pd.DataFrame({"case_id": ["c0", "c1", "c2"], "subject_id": ["a", "b", "c"]})
    groups = groups_of(facts(site=["[north", "above all", "B"]), ["site"], case_ids=["c0", "c1", "c2"])
    found = by_group(table, groups, measure=lambda part: pd.DataFrame({"n": [len(part)]}))
    assert found["group"].tolist() == sorted(["[north", "above all", "B"])


def test_facts_of_several_tables_are_joined_and_the_first_counts(tmp_path: Path) -> None:
    first, second = tmp_path / "facts.csv", tmp_path / "acquisition.csv"
    first.write_text("case_id,site,age\na,X,10\nb,Y,20\n")
    second.write_text("case_id,site,manufacturer\na,other,siemens\nc,Z,ge\n")
    found = read_facts([first, second])
    assert found.loc["a"].tolist() == ["X", "10", "siemens"]
    assert found.columns.tolist() == ["site", "age", "manufacturer"]
    assert set(found.index) == {"a", "b", "c"}
    assert read_facts([]).empty
    second.write_text("case_id,site\na,1\na,2\n")
    with pytest.raises(CaseError, match="line 3: case a has two rows") as error:
        read_facts([second])
    assert error.value.code == "E_TABLE"
    with pytest.raises(ReadError):
        read_facts([tmp_path / "none.csv"])
