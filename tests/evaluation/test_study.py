"""The label-savings study: fair arms, nothing done twice, and no sentence that the numbers do not carry."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny

from medssl.config import load_yaml
from medssl.data.store import ArrayStore
from medssl.errors import CheckpointError, ConfigError, NoInputError
from medssl.evaluation import runs
from medssl.evaluation import study as module
from medssl.evaluation.findings import compare_arms, findings, summarise_arms, without_true_negatives
from medssl.evaluation.study import StudyConfig, study
from medssl.runfolder import read_journal

SEGMENT = tiny.shorter(tiny.SEGMENT, 2)


def plan(**changes: Any) -> dict[str, Any]:
    return {"finetune": SEGMENT, "arms": {"scratch": {}}, "budgets": [2, "all"], "seeds": [0, 1], **changes}


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on a run that would train fails."""

    def refuse(*_: Any, dry_run: bool = False, **__: Any) -> None:
        assert dry_run, "trained again"

    monkeypatch.setattr(module, "finetune", refuse)
    monkeypatch.setattr(runs, "finetune", refuse)


def table(
    means: Mapping[str, Mapping[int, float]], *, seeds: int = 4, subjects: int = 12, noise: float = 0.01
) -> pd.DataFrame:
    """Results whose mean Dice is known: two structures, seeds and subjects that differ, and a little noise."""
    rng = np.random.default_rng(0)
    subject_effect = rng.normal(0, 0.05, subjects)
    rows = [
        {
            "arm": arm, "budget": budget, "seed": seed, "trial": 0,
            "case_id": f"c{subject}", "subject_id": f"s{subject}", "label": label,
            "dice": mean + subject_effect[subject] + rng.normal(0, noise),
            "nsd": 0.5, "hd95_mm": 3.0, "presence": "both",
        }
        for arm, budgets in means.items()
        for budget, mean in budgets.items()
        for seed in range(seeds)
        for subject in range(subjects)
        for label in (1, 2)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def sentences(results: pd.DataFrame, **changes: Any) -> list[str]:
    arms = {arm: {} if arm == "scratch" else {"bundle": arm} for arm in results["arm"].unique()}
    config = StudyConfig.parse(plan(arms=arms, budgets=sorted({int(b) for b in results["budget"]}), **changes))
    return findings(results, compare_arms(results, config), config)


def test_a_clear_gain_is_said_and_how_many_labels_it_saves() -> None:
    found = sentences(table({"scratch": {4: 0.6, 8: 0.68, 16: 0.75}, "voco": {4: 0.7, 8: 0.72, 16: 0.76}}))
    assert found[0].startswith("With 4 labelled subjects voco is better than scratch: Dice +0.")
    assert "95 % interval +0." in found[0]
    (equal,) = [
        sentence for sentence in found if sentence.startswith("voco with 4 labelled subjects equals scratch with 8:")
    ]
    shape = r"Dice \+0\.\d{4} \(95 % interval from [+-]0\.\d{4}; at most 0\.005 below counts as equal\)\."
    assert re.search(shape, equal)
    assert not any("with 8 labelled subjects equals" in sentence for sentence in found)


def test_no_gain_is_called_not_distinguishable_and_saves_no_label() -> None:
    found = sentences(table({"scratch": {4: 0.6, 16: 0.75}, "mae": {4: 0.6, 16: 0.75}}, noise=0.05))
    assert [sentence.split(":")[0] for sentence in found] == [
        "With 4 labelled subjects mae is not distinguishable from scratch",
        "With 16 labelled subjects mae is not distinguishable from scratch",
    ]


def test_a_loss_is_said_as_plainly() -> None:
    found = sentences(table({"scratch": {4: 0.6, 16: 0.75}, "mae": {4: 0.5, 16: 0.7}}))
    assert all("mae is worse than scratch: Dice -0." in sentence for sentence in found)
    assert len(found) == 2


def test_labels_are_only_saved_when_the_whole_interval_lies_above_the_margin() -> None:
    shares = {"scratch": {4: 0.60, 8: 0.70}, "voco": {4: 0.69, 8: 0.8}}
    precise, noisy = table(shares, noise=0.002), table(shares, noise=0.2)
    told = "voco with 4 labelled subjects equals scratch with 8: Dice -0.0"
    assert told not in " ".join(sentences(precise))
    assert told in " ".join(sentences(precise, margin=0.02))
    assert "equals" not in " ".join(sentences(noisy, margin=0.02))


def test_one_seed_alone_allows_no_claim() -> None:
    found = sentences(table({"scratch": {4: 0.5, 16: 0.6}, "voco": {4: 0.9, 16: 0.95}}, seeds=1))
    assert len(found) == 2
    assert all("not distinguishable" in sentence for sentence in found)


def test_comparisons_are_paired_by_seed_and_case() -> None:
    results = table({"scratch": {4: 0.6}, "voco": {4: 0.6}}, noise=0.0)
    gain = np.where(results["arm"] == "voco", 0.01 * (1 + results["seed"]) + 0.001 * results["label"], 0.0)
    results["dice"] += gain
    config = StudyConfig.parse(plan(arms={"scratch": {}, "voco": {"bundle": "x"}}, budgets=[4]))
    row = compare_arms(results, config).iloc[0]
    assert row["dice_gain"] == pytest.approx(np.mean([0.01, 0.02, 0.03, 0.04]) + 0.0015)
    # subjects differ by 0.05 and more, which a pairing cancels: only the four seeds are left
    spread = np.std([0.01, 0.02, 0.03, 0.04], ddof=1) / 2 * 3.182
    assert row["high"] - row["dice_gain"] == pytest.approx(spread, rel=1e-3)
    assert row["p_subjects"] < 0.01


def test_structures_in_no_map_are_left_out_of_every_mean_and_counted() -> None:
    results = table({"scratch": {4: 0.6}, "voco": {4: 0.6}}, noise=0.0)
    is_empty = (results["label"] == 2) & results["subject_id"].isin([f"s{i}" for i in range(6)])
    results.loc[is_empty, ["presence", "dice", "nsd", "hd95_mm"]] = ["neither", 1.0, 1.0, 0.0]
    invented = is_empty & (results["subject_id"] == "s0") & (results["arm"] == "voco") & (results["seed"] == 0)
    results.loc[invented, ["presence", "dice", "nsd", "hd95_mm"]] = ["invented", 0.0, 0.0, 99.0]
    counted, said = without_true_negatives(results)
    assert said == ["5 of 24 structures of cases are in no reference and no prediction; the means leave them out."]
    config = StudyConfig.parse(plan(arms={"scratch": {}, "voco": {"bundle": "x"}}, budgets=[4]))
    for row in summarise_arms(counted, config).to_dict("records"):
        part = counted[counted["arm"] == row["arm"]]
        assert len(part) == 4 * 19
        assert row["hd95_mm"] == pytest.approx(part["hd95_mm"].mean())
    assert compare_arms(counted, config).iloc[0]["dice_gain"] == pytest.approx(-1 / 2 / 4 / 12)
    with pytest.raises(NoInputError, match="no structure in any case"):
        without_true_negatives(results[results["presence"] == "neither"])


def test_the_order_of_the_rows_does_not_matter() -> None:
    results = table({"scratch": {4: 0.6, 8: 0.7}, "voco": {4: 0.7, 8: 0.7}}, noise=0.05)
    assert sentences(results) == sentences(results.sample(frac=1, random_state=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {"voco": {"bundle": "x"}}}, r"reference scratch is not among the arms voco"),
        ({"arms": {"scratch": {"bundle": "x"}}}, r"must be the from-scratch twin"),
        ({"arms": {"scratch": {}, "a": {"bundle": "x", "pretrain": "y"}}}, r"bundle and pretrain are both given"),
        ({"arms": {"scratch": {}, "a": {"bundl": "x"}}}, r"unknown key arms\.a\.bundl"),
        ({"budget": [4]}, r"unknown key budget\. Did you mean budgets\?"),
        ({"budgets": []}, r"budgets: .*at least 1"),
        ({"budgets": [99]}, r"budget 99 exceeds the 4 labelled training subjects"),
        ({"trials": [["task.mod=full"]]}, r"unknown key mod\. Did you mean mode\?"),
        ({"trials": [["train.lr=fast"]]}, r"train\.lr"),
        ({"finetune": {**SEGMENT, "nonsense": 1}}, r"unknown key nonsense"),
    ],
)
def test_a_wrong_plan_is_refused_before_anything_is_written(
    phantoms: Any, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        study(plan(**changes), store=phantoms.store, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_arm_that_cannot_be_loaded_is_found_before_the_first_run(
    phantoms: Any, encoder_bundle: Path, tmp_path: Path
) -> None:
    missing = plan(arms={"scratch": {}, "voco": {"bundle": str(tmp_path / "nowhere")}})
    with pytest.raises(CheckpointError, match="nowhere"):
        study(missing, store=phantoms.store, out=tmp_path / "out", dry_run=True)
    other = {**SEGMENT, "backbone": {**tiny.BACKBONE, "channels": [4, 16]}}
    unfit = plan(arms={"scratch": {}, "voco": {"bundle": str(encoder_bundle)}}, finetune=other)
    with pytest.raises(CheckpointError, match="backbone differs"):
        study(unfit, store=phantoms.store, out=tmp_path / "out")
    lost = plan(arms={"scratch": {}, "voco": {"pretrain": "nowhere.yaml"}})
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        study(lost, store=phantoms.store, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_store_without_test_cases_or_without_cases_to_tune_on_is_refused(
    phantoms: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    select = ArrayStore.select
    for split, changes in (("test", {}), ("val", {"trials": [[], ["seed=3"]]})):

        def without(self: ArrayStore, _split: str = split, **options: Any) -> Any:
            return () if options.get("split") == _split else select(self, **options)

        monkeypatch.setattr(ArrayStore, "select", without)
        with pytest.raises(NoInputError, match=f"no labelled case in the split {split}"):
            study(plan(**changes), store=phantoms.store, out=tmp_path / "out")


def test_a_dry_run_counts_the_runs_and_writes_nothing(phantoms: Any, tmp_path: Path) -> None:
    config = tmp_path / "study.yaml"
    config.write_text(json.dumps(plan()))
    result = study(config, store=phantoms.store, out=tmp_path / "out", overrides=["seeds=[0, 1, 2]"], dry_run=True)
    assert result.sentences == ("would run 1 arms x 2 budgets x 3 seeds",)
    assert not (tmp_path / "out").exists()


def test_a_budget_that_is_named_twice_is_run_once(phantoms: Any) -> None:
    assert module._budgets(StudyConfig.parse(plan(budgets=[2, 4, "all"])), phantoms.store) == (2, 4)


def test_arms_differ_in_their_encoder_and_in_nothing_else(phantoms: Any, tmp_path: Path) -> None:
    config = StudyConfig.parse(plan(arms={"scratch": {}, "voco": {"bundle": "x"}}, trials=[[], ["train.lr=1e-4"]]))
    make = module._Runs(config, SEGMENT, phantoms.store, tmp_path, {"scratch": None, "voco": tmp_path / "bundle"})
    for trial in (0, 1):
        one, other = (make(arm, 2, 7, trial=trial, split="test") for arm in ("scratch", "voco"))
        assert one.recipe == other.recipe
        assert (one.encoder, other.encoder) == (None, str(tmp_path / "bundle"))
        assert one.folder != other.folder
        recipe = json.loads(one.recipe)
        assert (recipe["seed"], recipe["label_draw"], recipe["num_labelled"]) == (7, 7, 2)
        assert recipe["train"]["lr"] == (4e-3, 1e-4)[trial]
        assert pickle.loads(pickle.dumps(one)) == one, "a run must reach a worker process"


@pytest.fixture(scope="module")
def finished(
    phantoms: Any, encoder_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path, Any]:
    """A study of three arms, one of which pretrains its own encoder, from a file with relative names."""
    home = tmp_path_factory.mktemp("study")
    (home / "segment.yaml").write_text(json.dumps(SEGMENT))
    (home / "mae.yaml").write_text(json.dumps(tiny.shorter(tiny.MAE, 2)))
    arms = {"scratch": {}, "voco": {"bundle": str(encoder_bundle)}, "mae": {"pretrain": "mae.yaml"}}
    config = plan(finetune="segment.yaml", arms=arms)
    (home / "study.yaml").write_text(json.dumps(config))
    return config, home, study(home / "study.yaml", store=phantoms.store, out=home / "out")


def test_a_study_leaves_tables_a_picture_a_page_its_recipe_and_a_journal(
    finished: tuple[dict[str, Any], Path, Any], phantoms: Any
) -> None:
    _, home, result = finished
    out = home / "out"
    results = pd.read_csv(out / "results.csv")
    test = ArrayStore.open(phantoms.store).select(split="test", labelled=True)
    assert len(results) == 3 * 2 * 2 * len(test) * 2, "arms x budgets x seeds x cases x structures"
    assert set(results["case_id"]) == {case.case_id for case in test}
    assert set(results["budget"]) == {2, 4}
    summary = pd.read_csv(out / "summary.csv")
    for row in summary.itertuples():
        part = results[(results["arm"] == row.arm) & (results["budget"] == row.labelled_subjects)]
        assert row.dice == pytest.approx(part["dice"].mean())
    comparisons = pd.read_csv(out / "comparisons.csv")
    assert set(comparisons["arm"]) == {"voco", "mae"}
    assert (out / "label_curve.png").read_bytes().startswith(b"\x89PNG")
    page = result.report.read_text()
    assert result.report == out / "report.html"
    assert result.sentences
    for sentence in result.sentences:
        assert sentence.replace("+", "&#43;") in page or sentence in page
    assert "file:" not in page
    assert load_yaml(out / "recipe.yaml")["finetune"] == SEGMENT
    line = read_journal(out / "journal.jsonl")[-1]
    assert (line["runs"], line["findings"]) == (12, list(result.sentences))


def test_a_finished_study_called_again_trains_nothing_and_says_the_same(
    finished: tuple[dict[str, Any], Path, Any], phantoms: Any, no_training: None
) -> None:
    _, home, result = finished
    again = study(home / "study.yaml", store=phantoms.store, out=home / "out")
    assert again.sentences == result.sentences
    pd.testing.assert_frame_equal(again.summary, result.summary)


def test_only_the_runs_that_are_missing_are_made(
    finished: tuple[dict[str, Any], Path, Any], phantoms: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, home, result = finished
    made: list[Path] = []
    finetune = runs.finetune

    def counting(*args: Any, out: Path, dry_run: bool = False, **options: Any) -> Any:
        made.extend([] if dry_run else [out])
        return finetune(*args, out=out, dry_run=dry_run, **options)

    monkeypatch.setattr(runs, "finetune", counting)
    lost = home / "out" / "runs" / "mae-2-1-0"
    before = pd.read_csv(lost / "scores-test.csv")
    (lost / "scores-test.sha256").unlink()
    again = study(home / "study.yaml", store=phantoms.store, out=home / "out")
    assert made == [lost]
    pd.testing.assert_frame_equal(pd.read_csv(lost / "scores-test.csv"), before)
    assert again.sentences == result.sentences


def test_scores_of_another_tolerance_are_not_used_again(
    finished: tuple[dict[str, Any], Path, Any], phantoms: Any
) -> None:
    _, home, result = finished
    again = study(home / "study.yaml", store=phantoms.store, out=home / "out", overrides=["nsd_tolerance_mm=9"])
    assert (again.summary["nsd"] > result.summary["nsd"]).all()
    assert again.summary["dice"].equals(result.summary["dice"])


def test_every_arm_chooses_its_trial_on_the_validation_split(
    phantoms: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[tuple[str, str, int, int]] = []

    def score(run: Any) -> pd.DataFrame:
        scored.append((run.arm, run.split, run.budget, run.trial))
        good = {"scratch": 1, "voco": 0}[run.arm] == run.trial
        cases = ArrayStore.open(Path(run.store)).select(split=run.split, labelled=True)
        rows = [
            {"arm": run.arm, "budget": run.budget, "seed": run.seed, "trial": run.trial, "case_id": case.case_id,
             "subject_id": case.subject_id, "label": 1, "dice": 0.9 if good else 0.1, "nsd": 0.5, "hd95_mm": 1.0,
             "presence": "both"}
            for case in cases
        ]  # fmt: skip
        return pd.DataFrame(rows)

    monkeypatch.setattr(runs, "_score", score)
    monkeypatch.setattr(module, "_check_arm", lambda *_, **__: None)
    config = plan(
        arms={"scratch": {}, "voco": {"bundle": "x"}}, budgets=["all", 2],
        trials=[[], ["train.lr=1e-4"]], tune_seeds=[5, 6],
    )  # fmt: skip
    result = study(config, store=phantoms.store, out=tmp_path / "out")
    tuning = [line for line in scored if line[1] == "val"]
    assert sorted(set(tuning)) == [(arm, "val", 2, trial) for arm in ("scratch", "voco") for trial in (0, 1)]
    assert len(tuning) == 8
    assert {line for line in scored if line[1] == "test"} == {
        (arm, "test", budget, trial) for arm, trial in (("scratch", 1), ("voco", 0)) for budget in (2, 4)
    }
    assert result.sentences[0] == (
        "Each arm tried 2 settings and kept its best on the validation split "
        "(scratch: train.lr=1e-4; voco: as written)."
    )
    assert set(pd.read_csv(tmp_path / "out" / "tuning.csv")["dice"]) == {0.9, 0.1}
    scored.clear()
    study({**config, "tune_budget": "all"}, store=phantoms.store, out=tmp_path / "all")
    assert {line[2] for line in scored if line[1] == "val"} == {4}
    scored.clear()
    study({**config, "tune_budget": 3}, store=phantoms.store, out=tmp_path / "three")
    assert {line[2] for line in scored if line[1] == "val"} == {3}


class Piece:
    """Stands for a run that only has a number."""

    share = False

    def __init__(self, number: int) -> None:
        self.number = number


def test_several_workers_score_every_run_and_one_fault_ends_the_study(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "ProcessPoolExecutor", lambda workers, **_: ThreadPoolExecutor(workers))
    monkeypatch.setattr(runs, "_score", lambda run: pd.DataFrame({"run": [run.number]}))
    pieces = [Piece(number) for number in range(9)]
    found = pd.concat(list(runs.execute(pieces, 3, "study")))  # type: ignore[arg-type]
    assert sorted(found["run"]) == list(range(9))

    def broken(run: Any) -> pd.DataFrame:
        if run.number == 2:
            raise CheckpointError("run 2 is broken")
        return pd.DataFrame({"run": [run.number]})

    monkeypatch.setattr(runs, "_score", broken)
    with pytest.raises(CheckpointError, match="run 2"):
        list(runs.execute(pieces, 2, "study"))  # type: ignore[arg-type]


def test_the_cases_of_each_budget_are_published_nested_and_verified(
    finished: tuple[dict[str, Any], Path, Any], phantoms: Any, no_training: None
) -> None:
    _, home, _ = finished
    splits = home / "out" / "splits"
    store = ArrayStore.open(phantoms.store)
    found = {path.stem: json.loads(path.read_text()) for path in sorted(splits.iterdir())}
    assert sorted(found) == [f"budget_{n}_seed_{s}" for n in (2, 4) for s in (0, 1)]
    for seed in (0, 1):
        few, all_ = found[f"budget_2_seed_{seed}"], found[f"budget_4_seed_{seed}"]
        assert few["subjects"] == all_["subjects"][:2]
        assert set(few["case_ids"]) < set(all_["case_ids"])
        assert few["sha256"] == hashlib.sha256("\n".join(few["case_ids"]).encode()).hexdigest()
        assert few["store"] == store.fingerprint
        trained = {case.case_id for case in store.select(split="train", labelled=True)}
        assert set(all_["case_ids"]) == trained
    path = splits / "budget_2_seed_1.json"
    kept = path.read_text()
    for damaged in (json.dumps({**json.loads(kept), "sha256": "0"}), "[]", "no json"):
        path.write_text(damaged)
        with pytest.raises(CheckpointError, match="names other cases"):
            study(home / "study.yaml", store=phantoms.store, out=home / "out")
    path.write_text(kept)


def test_machines_that_share_a_folder_do_every_run_once(
    phantoms: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    finetune = runs.finetune

    def counting(*args: Any, out: Path, dry_run: bool = False, **options: Any) -> Any:
        done.extend([] if dry_run else [out.name])
        return finetune(*args, out=out, dry_run=dry_run, **options)

    monkeypatch.setattr(runs, "finetune", counting)
    monkeypatch.setattr(runs, "_WAIT_S", 0.05)
    (tmp_path / "mae.yaml").write_text(json.dumps(tiny.shorter(tiny.MAE, 2)))
    config = plan(arms={"scratch": {}, "mae": {"pretrain": "mae.yaml"}}, budgets=[2], share=True)
    (tmp_path / "study.yaml").write_text(json.dumps(config))
    with ThreadPoolExecutor(2) as pool:
        machines = [
            pool.submit(study, tmp_path / "study.yaml", store=phantoms.store, out=tmp_path / "out") for _ in range(2)
        ]
        first, second = (machine.result(timeout=100) for machine in machines)
    assert sorted(done) == ["mae-2-0-0", "mae-2-1-0", "scratch-2-0-0", "scratch-2-1-0"]
    assert first.sentences == second.sentences
    pd.testing.assert_frame_equal(first.summary, second.summary)
    assert not list((tmp_path / "out").rglob("*.claim"))
    with pytest.raises(ConfigError, match="another study here") as caught:
        study({**config, "seeds": [7], "arms": {"scratch": {}}}, store=phantoms.store, out=tmp_path / "out")
    assert caught.value.code == "E_RESUME_DIFF"
    study(tmp_path / "study.yaml", store=phantoms.store, out=tmp_path / "out", overrides=["workers=1"])


def test_finished_models_are_tried_on_corrupted_images_and_told_apart_by_site(
    phantoms: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    select = ArrayStore.select

    def with_sites(self: ArrayStore, **options: Any) -> Any:
        cases = select(self, **options)
        for case in cases:
            case.facts = {
                "site": "north" if int(hashlib.sha256(case.case_id.encode()).hexdigest(), 16) % 2 else "south"
            }
        return cases

    tried = {"corruptions": ["noise"], "severities": [1, 5]}
    config = plan(site="site", robustness=tried, budgets=[2, 4], seeds=[0])
    with pytest.raises(ConfigError, match=r"no test case .* has a column site"):
        study(config, store=phantoms.store, out=tmp_path / "none")
    wrong = {**config, "site": None, "robustness": {"corruptions": ["nois"]}}
    with pytest.raises(ConfigError, match="nois cannot be tried"):
        study(wrong, store=phantoms.store, out=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    monkeypatch.setattr(ArrayStore, "select", with_sites)
    study(config, store=phantoms.store, out=tmp_path / "out")
    out = tmp_path / "out"
    corrupted, severities = pd.read_csv(out / "corrupted.csv"), pd.read_csv(out / "severities.csv")
    assert set(corrupted["budget"]) == {4}
    clean = pd.read_csv(out / "results.csv").query("budget == 4")["dice"].mean()
    row = severities.query("corruption == 'all' and severity == 0").iloc[0]
    assert row["dice"] == pytest.approx(clean)
    part = corrupted.query("corruption == 'noise' and severity == 5")
    row = severities.query("corruption == 'noise' and severity == 5").iloc[0]
    assert row["dice"] == pytest.approx(part["dice"].mean())
    assert row["drop"] == pytest.approx(clean - part["dice"].mean())
    assert (out / "severity_curve.png").read_bytes().startswith(b"\x89PNG")
    sites = pd.read_csv(out / "sites.csv")
    assert set(sites["site"]) <= {"north", "south", "not stated"}
    assert sites["seen"].between(0, 1).all()
    page = (out / "report.html").read_text()
    assert "Corrupted images" in page
    assert "Sites" in page
    monkeypatch.setattr(runs, "finetune", lambda *_, **__: pytest.fail("trained again"))
    study(config, store=phantoms.store, out=out)
