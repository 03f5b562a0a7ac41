"""The study: its arms, its claims and its tables, without training anything."""

import json
from pathlib import Path

import pocket
import pytest
import study

SIZES = dict(steps=24, qa_steps=12, warm_steps=100)


def test_the_interval_over_seeds_is_students():
    mean, half = study.spread([0.2, 0.3, 0.7])
    assert mean == pytest.approx(0.4) and half == pytest.approx(4.303 * 0.26458 / 3**0.5, rel=1e-3)
    assert study.spread([0.5]) == (0.5, None)


def test_perfect_relevance_answers_all_random_facts_some_and_a_guess_one_in_ten():
    scores = study.without_model(pocket.questions(600, 13))
    known = pocket.ROOM / (pocket.CHUNKS * pocket.FACTS_PER_CHUNK)
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
        if script == "tests/warm_start.py":
            (out / "model").mkdir(parents=True)
            (out / "questions").mkdir()
            for length in self.lengths:
                lines = [json.dumps(row) for row in pocket.questions(5, 0, 4 * length)]
                (out / f"questions/heldout-{length}x.jsonl").write_text("\n".join(lines))
            return
        model = flags[flags.index("--model") + 1]
        assert Path(model).exists()  # nothing starts from what is to come
        if script == "train.py":
            out.mkdir()
            before = {"trajectory": [0.25], "recall": [0.5], "questions": [0.25]}
            after = {"trajectory": [0.75], "recall": [0.5], "questions": [0.5]}
            lines = [json.dumps({"step": 0, "heldout": found}) for found in (before, after)]
            (out / "metrics.jsonl").write_text("\n".join(lines))
        else:
            table = {f"{n}x": {"em": [0.5, 0.4, 0.6]} for n in self.lengths}
            out.write_text(json.dumps({"table": table}))

    monkeypatch.setattr(study.Study, "start", start)
    return study.Study(tmp_path, 2, **SIZES, lengths=[1, 2]), commands


def test_every_arm_is_trained_and_asked_once_and_a_finished_study_starts_nothing(recorded):
    trained, commands = recorded
    trained.run()
    scripts = [script for script, *_ in commands]
    assert scripts.count("train.py") == 2 * (len(study.ARMS) - 1)
    assert scripts.count("eval.py") == 2 * len(study.ARMS)
    made = {str(trained.model("warm", seed)) for seed in trained.seeds}
    for script, *flags in commands:
        if script == "train.py":
            assert flags[flags.index("--model") + 1] in made and flags[-2] == "--out"
            made.add(flags[-1])
    assert len(made) == 2 * len(study.ARMS)
    assert {arm for pair in study.CLAIMS.values() for arm in pair} <= {*study.ARMS}
    trained.run()
    assert len(commands) == len(scripts)


def test_an_arm_starts_from_its_model_and_is_as_long_as_it_says(recorded):
    trained, commands = recorded
    trained.run()
    asked = {}
    for script, *flags in commands:
        if script == "train.py":
            start, steps = flags[flags.index("--model") + 1], flags[flags.index("--steps") + 1]
            asked[Path(flags[-1]).name] = Path(start).relative_to(trained.out), int(steps)
    warm = Path("pocket-901/model")
    assert asked["full-901"] == asked["shuffled-901"] == (warm, 24)
    assert asked["warm+QA-901"] == (warm, 12) and asked["warm+twicetheQA-901"] == (warm, 24)
    assert asked["full+QA-902"] == (Path("full-902"), 12)


def test_results_are_gathered_from_the_tables_and_metrics_of_all_seeds(recorded):
    trained, _ = recorded
    trained.run()
    results, heldout = trained.exact_match(), trained.heldout()
    assert results["full + QA"] == {1: [0.5, 0.5], 2: [0.5, 0.5]} and set(results) > set(study.ARMS)
    assert heldout["e2e"]["E2E before"] == [0.25] * 2 and heldout["e2e"]["E2E after"] == [0.75] * 2
    assert heldout["e2e"]["recall before"] == heldout["e2e"]["recall after"] == [0.5] * 2
    assert heldout["full"]["questions before"] == [0.25] * 2


def test_the_report_shows_means_over_seeds_and_pairs_differences_by_seed():
    results = {name: {1: [0.1, 0.5, 0.9], 2: [0.1, 0.5, 0.9]} for name in study.ARMS}
    results["full"] = {1: [0.2, 0.6, 1.0], 2: [0.1, 0.5, 0.9]}
    found = {"E2E before": [0.25] * 3, "E2E after": [0.75] * 3, "recall before": [0.5] * 3}
    lines = study.report(results, dict.fromkeys(("full", "e2e"), found), [1, 2]).splitlines()
    assert "| full | 60.0 ± 99.3 | 50.0 ± 99.3 | 55.0 ± 99.3 |" in lines
    assert "| (a) MemTrain alone: full - warm | 10.0 ± 0.0 | 0.0 ± 0.0 | 5.0 ± 0.0 |" in lines
    assert "| e2e | 25.0 ± 0.0 | 75.0 ± 0.0 | 50.0 ± 0.0 |" in lines
    by_length = {name: {8: [0.2], 16: [0.6]} for name in study.ARMS}
    longer = study.report(by_length, {"full": {"E2E before": [0.5]}}, [8, 16])
    assert "| 8x | 16x | mean to 8x |" in longer and "| full | 20.0 | 60.0 | 20.0 |" in longer


def test_a_script_that_fails_is_named_with_its_log(tmp_path):
    broken = study.Study(tmp_path, 1, steps=1, qa_steps=1, lengths=[1], warm_steps="many")
    message = r"warm_start.py .* failed: see .*pocket-901.log; start the study again to continue"
    with pytest.raises(SystemExit, match=message):
        broken.run()
    assert "many" in (tmp_path / "pocket-901.log").read_text()


def test_a_figure_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    results = {name: {1: [0.1, 0.5], 2: [0.1, 0.5]} for name in ["guess", *study.ARMS]}
    study.draw(tmp_path / "figure.png", results, [1, 2])
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
