"""The study: its arms, its claims and its tables, without training anything."""

import json
import time
from pathlib import Path

import pytest
import study

import tiny

SIZES = dict(steps=24, qa_steps=12, warm_steps=100)


def test_the_interval_over_seeds_is_students():
    mean, half = study.spread([0.2, 0.3, 0.7])
    assert mean == pytest.approx(0.4) and half == pytest.approx(4.303 * 0.26458 / 3**0.5, rel=1e-3)
    assert study.spread([0.5]) == (0.5, None)


def test_perfect_relevance_answers_all_random_facts_some_and_a_guess_one_in_ten():
    scores = study.without_model(tiny.questions(600, 13))
    known = tiny.ROOM / (tiny.CHUNKS * tiny.FACTS_PER_CHUNK)
    assert scores["perfect relevance"] > 0.95
    assert abs(scores["random facts"] - (known + (1 - known) / 10)) < 0.07
    assert abs(scores["guess"] - 1 / 10) < 0.05


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A study of two seeds whose scripts leave what the real ones would; the commands in order."""
    commands = []

    def start(self, log, script, *flags):
        flags = [str(flag) for flag in flags]
        commands.append([script, *flags])
        out = Path(flags[-1])
        if script != "tiny.py":
            model = flags[flags.index("--model") + 1]
            assert Path(model).exists()  # nothing starts from what is to come
        time.sleep(0.02)
        if script == "tiny.py":
            (out / "model").mkdir(parents=True)
            (out / "questions").mkdir()
            for length in self.lengths:
                lines = [json.dumps(row) for row in tiny.questions(5, 0, 4 * length)]
                (out / f"questions/heldout-{length}x.jsonl").write_text("\n".join(lines))
        elif script == "train.py":
            out.mkdir()
            looks = [
                {"trajectory": [0.25], "recall": [0.5], "questions": [0.25]},
                {"trajectory": [0.75], "recall": [0.5], "questions": [0.5]},
            ]
            lines = [json.dumps({"step": 0, "heldout": look}) for look in looks]
            (out / "metrics.jsonl").write_text("\n".join(lines))
        else:
            table = {f"{n}x": {"em": [0.5, 0.4, 0.6]} for n in self.lengths}
            out.write_text(json.dumps({"table": table}))

    monkeypatch.setattr(study.Study, "start", start)
    return study.Study(tmp_path, 2, **SIZES, lengths=[1, 2]), commands


def test_every_arm_is_trained_from_a_model_that_is_there_and_asked_once(recorded):
    trained, commands = recorded
    trained.run()
    assert [script for script, *_ in commands].count("train.py") == 2 * (len(study.ARMS) - 1)
    assert [script for script, *_ in commands].count("eval.py") == 2 * len(study.ARMS)
    made = {str(trained.model("warm", seed)) for seed in trained.seeds}
    for script, *flags in commands:
        if script == "train.py":
            assert flags[flags.index("--model") + 1] in made and flags[-2] == "--out"
            made.add(flags[-1])
    assert len(made) == 2 * len(study.ARMS)
    assert {arm for pair in study.CLAIMS.values() for arm in pair} <= {*study.ARMS}


def test_some_arms_alone_are_run_and_reported(recorded):
    trained, commands = recorded
    some = ["full", "warm + QA", "full + QA"]
    part = study.Study(trained.out, 2, **SIZES, lengths=[1, 2], arms=some)
    part.run()
    assert [script for script, *_ in commands].count("train.py") == 2 * len(some)
    lines = study.report(part.exact_match(), part.looks(), [1, 2])
    assert "(b) MemTrain before QA" in lines and "shuffled" not in lines and "| warm |" in lines


def test_an_arm_that_is_asked_for_brings_the_one_it_starts_from_and_waits_for_it(recorded):
    trained, commands = recorded
    study.Study(trained.out, 1, **SIZES, lengths=[1], arms=["full + QA"]).run()
    made = [flags[-1].split("/")[-1] for script, *flags in commands if script == "train.py"]
    assert made == ["full-901", "full+QA-901"]


def test_qa_is_as_long_and_as_fast_as_its_arm_says(recorded):
    trained, commands = recorded
    trained.run()
    asked = {}
    for script, *flags in commands:
        if script == "train.py" and "longqa" in flags:
            lr = flags[flags.index("--lr") + 1] if "--lr" in flags else tiny.SETTINGS["lr"]
            asked[flags[-1].split("/")[-1]] = int(flags[flags.index("--steps") + 1]), float(lr)
    rate = tiny.SETTINGS["lr"]
    assert asked["warm+QA-901"] == asked["full+QA-902"] == (12, rate)
    assert asked["warm+twicetheQA-901"] == (24, rate) and asked["warm+QAaslong-901"] == (36, rate)
    assert asked["warm+QAathalftherate-901"] == (12, rate / 2)


def test_a_finished_study_starts_nothing_again(recorded):
    trained, commands = recorded
    trained.run()
    count = len(commands)
    trained.run()
    assert len(commands) == count


def test_results_are_gathered_from_the_tables_and_metrics_of_all_seeds(recorded):
    trained, _ = recorded
    trained.run()
    results, looks = trained.exact_match(), trained.looks()
    assert results["full + QA"] == {1: [0.5, 0.5], 2: [0.5, 0.5]} and set(results) > set(study.ARMS)
    assert looks["e2e"]["E2E before"] == [0.25] * 2 and looks["e2e"]["E2E after"] == [0.75] * 2
    assert looks["e2e"]["recall before"] == looks["e2e"]["recall after"] == [0.5] * 2
    assert looks["full"]["questions before"] == [0.25] * 2


def test_the_report_shows_means_over_seeds_and_pairs_differences_by_seed():
    results = {name: {1: [0.1, 0.5, 0.9], 2: [0.1, 0.5, 0.9]} for name in study.ARMS}
    results["full"] = {1: [0.2, 0.6, 1.0], 2: [0.1, 0.5, 0.9]}
    looks = {
        "E2E before": [0.25] * 3,
        "E2E after": [0.75] * 3,
        "recall before": [0.5] * 3,
        "recall after": [0.5] * 3,
    }
    lines = study.report(results, dict.fromkeys(("full", "e2e"), looks), [1, 2]).splitlines()
    assert "| full | 60.0 ± 99.3 | 50.0 ± 99.3 | 55.0 ± 99.3 |" in lines
    assert "| (a) MemTrain alone: full - warm | 10.0 ± 0.0 | 0.0 ± 0.0 | 5.0 ± 0.0 |" in lines
    looks = {"full": {"E2E before": [0.5]}}
    by_length = {name: {8: [0.2], 16: [0.6]} for name in study.ARMS}
    longer = study.report(by_length, looks, [8, 16])
    assert "| 8x | 16x | mean to 8x |" in longer and "| full | 20.0 | 60.0 | 20.0 |" in longer
    longest = study.report({name: {16: [0.6]} for name in study.ARMS}, looks, [16])
    assert "| full | 60.0 | 60.0 |" in longest
    assert "held-out rows" not in study.report({"warm + QA": {1: [0.5]}}, {}, [1])
    assert "| e2e | 25.0 ± 0.0 | 75.0 ± 0.0 | 50.0 ± 0.0 | 50.0 ± 0.0 |" in lines


def test_a_script_that_fails_is_named_with_its_log(tmp_path):
    broken = study.Study(tmp_path, 1, steps=1, qa_steps=1, lengths=[1], warm_steps="many")
    message = r"tiny.py .* failed: see .*tiny-901.log; started again, the study goes on"
    with pytest.raises(SystemExit, match=message):
        broken.run()
    assert "many" in (tmp_path / "tiny-901.log").read_text()
