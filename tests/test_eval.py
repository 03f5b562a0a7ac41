"""eval.py: scripted models whose scores are known by hand, stopping, ranks, tables, curves."""

import doctest
import json
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen3Config

import data
import distributed
import eval as evaluation
import train
from rollout import Asker, Prompts, Response, Searcher

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"


class FindsInMemory:
    """A sampler that reads decoded prompts. It remembers sentences about the question's last word,
    and what is no whole sentence yet; it answers with the word behind 'is', and guesses nothing."""

    def __init__(self, prompts):
        self.prompts = prompts

    def __call__(self, asked, limits, keys):
        end = [self.prompts.tokenizer.eos_token_id]
        responses = []
        for ids in asked:
            text = self.respond(self.prompts.tokenizer.decode(ids))
            responses.append(Response(self.prompts.encode(text) + end))
        return responses

    def respond(self, text):
        blocks = dict(re.findall(r"<(problem|memory|section)>\n(.*?)\n</\1>", text, re.DOTALL))
        subject = blocks["problem"].split()[-1].rstrip("?")
        if "section" in blocks:
            *sentences, tail = re.split(
                r"(?<=\.) ", blocks["memory"] + blocks["section"]
            )  # a chunk may end in a word
            return " ".join(
                [*(sentence for sentence in sentences if f"{subject} is " in sentence), tail]
            )
        found = re.search(rf"{subject} is (\w+)", blocks["memory"])
        return rf"\boxed{{{found[1]}}}" if found else "I do not know."


def facts(count, gold=True):
    """A question for each of `count` facts, its document all of them, without `gold` the others."""
    names = [f"Name{chr(65 + i // 10)}{chr(65 + i % 10)}" for i in range(count)]
    sentences = [f"{name} is colour{i}." for i, name in enumerate(names)]
    rows = []
    for i, name in enumerate(names):
        told = " ".join(sentences if gold else sentences[:i] + sentences[i + 1 :])
        row = {"id": name, "question": f"What is {name}?", "answers": [f"colour{i}"]}
        rows.append({**row, "context": told})
    return rows


def records_of(folder, tokenizer, rows, sampler=FindsInMemory, name="facts", model=None, **flags):
    """eval.py's records of a set, with a scripted model in a context of 4096 tokens."""
    args = {"command": "longqa", "mode": "memory", "samples": 1, "batch": 5}
    args = Namespace(**{**args, "out": str(folder / "table.json"), **flags})
    prompts = Prompts(tokenizer)
    cfg = train.Config(chunk_tokens=24, memory_tokens=64, answer_tokens=64, max_chunks=10**9)
    policy = torch.nn.Module()
    policy.lm = SimpleNamespace(config=model or Qwen3Config(max_position_embeddings=4096))
    setup = train.Setup(cfg, prompts, sampler(prompts))
    return evaluation.run_set(args, setup, policy, name, rows)


def test_a_model_that_searches_its_memory_is_right_where_the_document_tells(
    alone, tokenizer, tmp_path
):
    row = evaluation.summary(records_of(tmp_path, tokenizer, facts(20)))
    assert row["n"] == 20 and row["unanswered"] == 0
    assert row["em"][0] == row["sub_em"][0] == row["f1"][0] == row["memagent_sub_em"][0] == 1.0
    assert row["turns"] > 5  # the document took many chunks


def test_without_the_gold_sentence_every_answer_counts_as_wrong_and_none_is_missing(
    alone, tokenizer, tmp_path
):
    row = evaluation.summary(records_of(tmp_path, tokenizer, facts(20, gold=False)))
    assert row["n"] == 20 and row["unanswered"] == 1.0
    assert row["em"][0] == row["sub_em"][0] == row["f1"][0] == row["memagent_sub_em"][0] == 0.0


def test_a_stopped_evaluation_goes_on_and_counts_every_sample_once(alone, tokenizer, tmp_path):
    asked = []

    class Counts(FindsInMemory):
        def __call__(self, prompts, limits, keys):
            asked.extend(keys)
            return super().__call__(prompts, limits, keys)

    whole = records_of(tmp_path, tokenizer, facts(8), samples=2)
    keys = [(record["index"], record["sample"]) for record in whole]
    assert keys == [(index, sample) for index in range(8) for sample in range(2)]

    part = tmp_path / "table.json.parts" / "facts" / "rank0.jsonl"
    for kept in (5, 9):  # killed while the next line was being written, twice
        lines = part.read_text().splitlines(keepends=True)
        part.write_text("".join(lines[:kept]) + lines[kept][:20])
        finished = sum(line.endswith("}\n") for line in lines[:kept])
        asked.clear()
        assert records_of(tmp_path, tokenizer, facts(8), Counts, samples=2) == whole
        assert len({key[:3] for key in asked}) == 16 - finished
        assert {key[0] for key in asked} == {"facts"}


def test_samples_on_other_ranks_count_and_more_samples_add_to_those_that_are_there(
    alone, tokenizer, tmp_path
):
    first = records_of(tmp_path, tokenizer, facts(4))
    parts = tmp_path / "table.json.parts" / "facts"
    (parts / "rank0.jsonl").rename(parts / "rank7.jsonl")
    more = records_of(tmp_path, tokenizer, facts(4), samples=3)
    assert [record for record in more if record["sample"] == 0] == first and len(more) == 12


@pytest.mark.parametrize("name", ["a[1]", "*", "a?", "a=b", "a.rank0", "a b"])
def test_a_set_keeps_its_samples_whatever_it_is_called(name, alone, tokenizer, tmp_path):
    def nothing(prompts):
        return None  # no sampler: all samples must be there

    named = records_of(tmp_path, tokenizer, facts(3), name=name)
    other = records_of(tmp_path, tokenizer, facts(3, gold=False), name="a")
    assert [record["em"] for record in named + other] == [1, 1, 1, 0, 0, 0]
    assert records_of(tmp_path, tokenizer, facts(3), nothing, name) == named
    assert records_of(tmp_path, tokenizer, facts(3, gold=False), nothing, "a") == other


def test_nothing_that_a_model_writes_breaks_the_lines_that_samples_are_kept_in(
    alone, tokenizer, tmp_path
):
    class WritesAnything(FindsInMemory):
        def respond(self, text):
            return '\u2028 \x85 \x0c \r\n \x00 {"index": 0} \\boxed{\u2029 }'

    first = records_of(tmp_path, tokenizer, facts(3), WritesAnything)
    assert "\u2028" in first[0]["answer"]
    assert records_of(tmp_path, tokenizer, facts(3), sampler=lambda prompts: None) == first


def test_an_empty_or_cut_answer_is_wrong_in_every_score(tokenizer):
    prompts = Prompts(tokenizer)
    for text in ("", r"\boxed{}", r"\boxed{Rome", "Rome"):
        agent = Asker(prompts, [1], 8, (0,))
        agent.turns.append(SimpleNamespace(prompt_ids=[1], response_ids=[1, 2], truncated=True))
        agent.receive(prompts.encode(text))
        record = evaluation.record_of(agent, {"answers": ["Rome", "the"]})
        assert all(record[score] == 0 for score in evaluation.SCORES), text
        assert record["truncated"] == 1 and record["tokens"] == record["peak_context"] == 3


def test_answers_to_several_questions_are_scored_by_position_and_averaged(tokenizer):
    prompts = Prompts(tokenizer)
    agent = Searcher(prompts, [], 2, 64, 64, (0,))
    agent.turns.append(SimpleNamespace(prompt_ids=[1], response_ids=[1], truncated=False))
    agent.receive(tokenizer("<think>x</think><answer>Paris; Rome</answer>")["input_ids"])
    for golds, em, unanswered in [
        ([["Paris"], ["Rome"]], 1, 0),
        ([["Rome"], ["Paris"]], 0, 0),
        ([["Paris"], ["Oslo"], ["Rome"]], 1 / 3, 1 / 3),
    ]:
        record = evaluation.record_of(agent, {"answers": golds})
        assert (record["em"], record["unanswered"]) == (em, unanswered)


def test_the_samples_of_a_question_are_averaged_before_the_interval():
    records = []
    for index, em in enumerate([1.0, 0.0, 1.0, 1.0]):
        record = {"index": index, "id": "q", "answer": "a", "em": em, "turns": 2}
        records += [{**record, "sample": sample} for sample in range(5)]
    row = evaluation.summary(records)
    assert row == {"n": 4, "em": list(train.interval([1.0, 0.0, 1.0, 1.0])[:3]), "turns": 2}


def test_a_whole_document_is_cut_in_the_middle_to_the_context_and_says_so(tokenizer):
    prompts = Prompts(tokenizer)
    text = " ".join(f"word{i}" for i in range(400))

    def read(context):
        problem, document = prompts.encode("Which?"), prompts.encode(text)
        return evaluation.WholeReader(prompts, problem, document, context, 16, (0,))

    whole, short = read(10**6), read(512)
    assert not whole.document_cut and text in prompts.text(whole.ids)
    assert short.document_cut and len(short.ids) + 16 == 512
    assert "word0 " in prompts.text(short.ids) and "word399" in prompts.text(short.ids)
    with pytest.raises(data.InputError, match="lower --answer_tokens"):
        read(20)


def test_full_context_shows_in_one_turn_the_document_that_memory_mode_reads_in_many(
    alone, tokenizer, tmp_path
):
    seen, rows = [], facts(9)[:1]

    class Records(FindsInMemory):
        def respond(self, text):
            seen.append(text)
            return ""

    (whole,) = records_of(tmp_path / "whole", tokenizer, rows, Records, mode="full_context")
    assert whole["turns"] == 1 and whole["document_cut"] == 0
    assert rows[0]["context"] in seen[0]
    (memory,) = records_of(tmp_path / "memory", tokenizer, rows)
    assert memory["turns"] > 2 and memory["document_tokens"] == whole["document_tokens"]


def test_the_whole_document_fills_the_context_of_the_model_and_yarn_widens_it(
    alone, tokenizer, tmp_path
):
    class Silent(FindsInMemory):
        def respond(self, text):
            return ""

    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512}
    for rope, cut in ((None, 1), (yarn | {"rope_theta": 1e4}, 0)):
        model = Qwen3Config(max_position_embeddings=512, rope_parameters=rope)
        flags = {"model": model, "mode": "full_context"}
        (record,) = records_of(tmp_path / str(cut), tokenizer, facts(60)[:1], Silent, **flags)
        prompt = record["peak_context"] - 1  # an end token is the response
        assert record["document_cut"] == cut
        assert prompt + 64 == 512 if cut else 512 < prompt + 64 <= 4096


@pytest.mark.parametrize("said", [r"\boxed{colour1}", "Colour1."])
def test_the_filter_asks_without_the_context_and_drops_what_is_known_boxed_or_not(
    said, alone, tokenizer, tmp_path, capsys
):
    class Knows(FindsInMemory):
        def respond(self, text):
            assert "colour" not in text
            return said

    rows = facts(3)
    records = records_of(tmp_path, tokenizer, rows, Knows, command="filter", samples=2)
    evaluation.write_questions(tmp_path / "left.jsonl", {"facts": rows}, {"facts": records})
    left = data.load_questions(str(tmp_path / "left.jsonl"))
    assert [row["id"] for row in left] == ["NameAA", "NameAC"]
    assert left[0]["context"] == rows[0]["context"]
    assert "2 of 3 questions" in capsys.readouterr().out


def test_sets_have_names_and_default_to_the_held_out_files_of_the_models_settings(
    pocket_model, tmp_path, monkeypatch
):
    def sets(*flags):
        args = evaluation.parse(["longqa", "--model", pocket_model, "--out", "x", *flags])
        return list(evaluation.load_sets(args, evaluation.config_of(args)))

    settings = train.model_settings(pocket_model)["settings"]["longqa"]
    assert sets() == [Path(path).name.split(".")[0] for path in settings["heldout"]]

    monkeypatch.chdir(tmp_path)
    Path("lr=1").mkdir()
    for file in ("lr=1/a.jsonl", "b.dev.jsonl", "c[1]*.jsonl", "d=1.jsonl"):
        Path(file).write_text("".join(json.dumps(row) + "\n" for row in facts(2)))
    given = ["nq=lr=1/a.jsonl", "lr=1/a.jsonl", "b.dev.jsonl", "c[1]*.jsonl", "d=1.jsonl"]
    assert sets("--data", *given) == ["nq", "a", "b", "c[1]*", "d=1"]
    assert sets("--data", f"e={tmp_path}/d=1.jsonl", f"{tmp_path}/lr=1/a.jsonl") == ["e", "a"]
    for same in (["lr=1/a.jsonl"] * 2, ["a=b.dev.jsonl", "lr=1/a.jsonl"], ["average=d=1.jsonl"]):
        with pytest.raises(data.InputError, match="two sets are called a"):
            sets("--data", *same)


def test_flags_win_over_the_models_settings_and_nothing_is_too_long_to_read(pocket_model):
    settings = train.model_settings(pocket_model)["settings"]
    flags = ["memtrain", "--model", pocket_model, "--memory_tokens", "7"]
    cfg = evaluation.config_of(evaluation.parse(flags))
    assert cfg.memory_tokens == 7 != settings["all"]["memory_tokens"]
    assert cfg.chunk_tokens == settings["all"]["chunk_tokens"]
    assert cfg.max_chunks >= 10**9 and cfg.data == settings["memtrain"]["data"]


def test_help_says_where_defaults_come_from(capsys):
    with pytest.raises(SystemExit):
        evaluation.parse(["--help"])
    own, settings = capsys.readouterr().out.split("\nsettings:\n")
    assert "the model's memtrain.json" in settings and "--chunk_tokens" in settings
    assert "[memory]" in own and "[0.7]" in own and "[32]" in own and "--chunk_tokens" not in own


@pytest.mark.parametrize("task, command, agent", [
    ("mine", "longqa", "Reader"), ("mine", "memtrain", "Reader"), ("mine", "searchqa", "Searcher"),
    ("searchqa", "longqa", "Reader"), ("memtrain", "searchqa", "Searcher"),
    ("longqa", "memtrain", None), ("memtrain", "longqa", None), ("searchqa", "searchqa", None),
    (None, "longqa", None), ("mine", "filter", None),
])  # fmt: skip
def test_a_model_that_another_agent_was_trained_for_gets_a_note(
    task, command, agent, pocket_model, tmp_path, capsys, monkeypatch, alone
):
    monkeypatch.setattr(distributed, "start_ranks", lambda: alone)
    model = tmp_path / "model"
    shutil.copytree(pocket_model, model)
    settings = train.model_settings(pocket_model) | ({"task": task} if task else {})
    (model / "memtrain.json").write_text(json.dumps(settings))
    flags = [command, "--model", str(model), "--out", "x", "--data", "y"]
    args = evaluation.parse(flags)
    evaluation.open_model(args, evaluation.config_of(args))
    notes = [line for line in capsys.readouterr().err.splitlines() if "note" in line]
    said = f"note: {model} was trained by --task {task}; this command answers with a {agent}"
    assert notes == ([said] if agent else [])


def run(arguments, folder, ranks=1):
    """eval.py in processes of their own; -> what it prints"""
    script = [str(ROOT / "eval.py"), *arguments]
    if ranks > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        script = launch + script
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *script], capture_output=True, text=True, env=env, cwd=folder, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def first_rows(pocket_model, task, count, folder, skip=0):
    """A file with the first held-out questions that a model's settings name."""
    path = train.model_settings(pocket_model)["settings"][task]["heldout"][0]
    lines = Path(path).read_text().splitlines(keepends=True)
    file = folder / f"{task}.jsonl"
    file.write_text("".join(lines[skip : skip + count]))
    return file.name


def test_two_ranks_give_the_table_of_one_with_sampling(pocket_model, tmp_path):
    file = first_rows(pocket_model, "longqa", 6, tmp_path)
    flags = ["--model", pocket_model, "--data", f"a={file}", f"b={file}"]
    flags += ["--samples", "2", "--batch", "4", "--temperature", "2"]
    tables = []
    for ranks in (1, 2):
        run(["longqa", *flags, "--out", f"{ranks}.json"], tmp_path, ranks)
        tables.append(json.loads((tmp_path / f"{ranks}.json").read_text())["table"])
    assert tables[0] == tables[1] and list(tables[0]) == ["a", "b", "average"]
    assert tables[0]["a"]["n"] == 6
    done = sorted(path.read_text().count("}\n") for path in tmp_path.glob("2.json.parts/a/*"))
    assert done == [6, 6]  # ranks share the work
    answers = {}
    for name in "ab":
        lines = (tmp_path / "1.json.parts" / name / "rank0.jsonl").read_text().split("\n")
        answers[name] = [json.loads(line)["answer"] for line in lines if line]
    assert answers["a"] != answers["b"]  # noise is of the set, question and sample
    assert len(set(answers["a"])) > 6


def test_memtrain_prints_held_out_figures_with_intervals(pocket_model, tmp_path):
    printed = run(
        ["memtrain", "--model", pocket_model, "--eval_documents", "8", "--out", "proxy.json"],
        tmp_path,
    )
    assert "| E2E" in printed and "| recall" in printed
    table = json.loads((tmp_path / "proxy.json").read_text())
    mean, low, high = table["E2E"]["em"]
    assert table["E2E"]["n"] == 8 and low <= mean <= high


def test_searchqa_searches_the_corpus_of_the_models_settings(
    pocket_model, tmp_path, alone, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distributed, "start_ranks", lambda: alone)
    file = first_rows(pocket_model, "searchqa", 4, tmp_path)
    rows = data.load_questions(file, objectives=2)
    seen = []

    def answers_after_a_search(cfg, policy, tokenizer, *, search, **sampling):
        def sampler(asked, limits, keys):
            responses = []
            for ids, (_, index, _, turn) in zip(asked, keys):
                seen.append(tokenizer.decode(ids))
                golds = " ; ".join(answers[0] for answers in rows[index]["answers"])
                text = f"<answer> {golds} </answer>" if turn else f"<search> {golds} </search>"
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                responses.append(Response([*ids, tokenizer.eos_token_id]))
            return responses

        prompts = Prompts(tokenizer, train.model_settings(cfg.model)["templates"])
        return train.Setup(cfg, prompts, sampler, search)

    monkeypatch.setattr(train, "open_setup", answers_after_a_search)
    flags = ["--model", pocket_model, "--data", file, "--out", "t.json"]
    evaluation.questions(evaluation.parse(["searchqa", *flags]))
    row = json.loads(Path("t.json").read_text())["table"]["searchqa"]
    assert row["n"] == 2  # pairs
    assert row["searches"] == 1 and row["turns"] == 2
    assert row["em"][0] == row["f1"][0] == 1 and row["malformed"] == row["unanswered"] == 0
    assert ["<information>" in text for text in seen] == [False, False, True, True]


CONTENT = ["config.json", "model.safetensors", "memtrain.json", "tokenizer.json", "corpus.jsonl"]


@pytest.mark.parametrize("change, name", [
    ({}, None),
    ({"flags": "--samples 4 --batch 7 --data more.json --kv_tokens 9".split()}, None),
    ({"sets": {"b": facts(3)}}, None),
    ({"sets": {"a": [row | {"id": "other"} for row in facts(2)]}}, None),
    ({"sets": {"a": facts(3)}}, "questions of a"),
    ({"sets": {"b": [], "a": facts(2, gold=False)}}, "questions of a"),
    ({"sets": {"a": [row | {"answers": ["x"]} for row in facts(2)]}}, "questions of a"),
    ({"sets": {"a": [row | {"question": "x"} for row in facts(2)]}}, "questions of a"),
    ({"flags": ["--greedy"]}, "flags"),
    ({"flags": ["--chunk_tokens", "9"]}, "flags"),
    ({"model": "moved"}, "model"),
    *(({"written": name}, "model") for name in CONTENT),
])  # fmt: skip
def test_finished_samples_of_another_model_other_flags_or_other_questions_are_refused(
    change, name, alone, tmp_path
):
    model = tmp_path / "model"
    model.mkdir()
    for file in CONTENT:
        (model / file).write_text('{"problem": "1"}')

    def open_parts(flags=(), sets={"a": facts(2)}, model=model):
        out = str(tmp_path / "t.json")
        args = evaluation.parse(["longqa", "--model", "x", "--out", out, *flags])
        cfg = train.Config(model=str(model), retriever=str(tmp_path / "model" / "corpus.jsonl"))
        evaluation.open_parts(args, cfg, sets)

    open_parts()
    change = dict(change)
    if "written" in change:
        (model / change.pop("written")).write_text('{"problem": "2"}')
    if change.get("model"):
        change["model"] = model.rename(tmp_path / "moved")
    if name is None:
        open_parts(**change)
        change, name = {"sets": {"a": facts(3)}}, "questions of a"  # still known
    with pytest.raises(data.InputError, match=f"other {name}, see flags.json"):
        open_parts(**change)


def test_samples_of_other_questions_at_the_same_path_are_in_no_table(
    pocket_model, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for skip, count in ((0, 2), (2, 3)):
        file = first_rows(pocket_model, "longqa", count, tmp_path, skip)
        flags = ["longqa", "--model", pocket_model, "--data", file, "--out", "t.json"]
        if skip == 0:
            evaluation.main(flags)
            continue
        with pytest.raises(SystemExit) as stopped:
            evaluation.main(flags)
    assert stopped.value.code == 2 and "other questions of longqa" in capsys.readouterr().err
    assert json.loads(Path("t.json").read_text())["table"]["longqa"]["n"] == 2
    shutil.rmtree("t.json.parts")
    evaluation.main(flags)
    assert json.loads(Path("t.json").read_text())["table"]["longqa"]["n"] == 3


def test_the_examples_in_the_docstrings_hold():
    result = doctest.testmod(evaluation)
    assert result.attempted and not result.failed


def test_the_interval_is_wilsons_and_stays_inside():
    mean, low, high, n = train.interval([1.0] * 3 + [0.0])
    assert (mean, n) == (0.75, 4)
    assert low == pytest.approx(0.3006, abs=1e-4) and high == pytest.approx(0.9544, abs=1e-4)
    _, low, high, _ = train.interval([0.0] * 10)
    assert low == 0 and high == pytest.approx(0.2775, abs=1e-4)


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
@pytest.mark.parametrize(
    "file, documents", [("rulerhqa_shaped_50.json", 50), ("rulerhqa_shaped_200.json", 200)]
)
def test_evaluation_files_of_memagents_shape_load_whole(file, documents):
    for row in data.load_questions(str(SHARED / file)):
        assert row["context"].count("Document ") >= documents
        assert row["answers"] and isinstance(row["answers"], list)


def test_curves_draw_runs_and_tables_on_one_page_where_they_can_be_seen(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    monkeypatch.chdir(tmp_path)
    drawn, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda *a, **b: drawn.append(a[0]) or savefig(*a, **b))
    heldout = {"trajectory": [0.1, 0.0, 0.2, 9], "recall": [0.3, 0.2, 0.4, 9]}
    evaluated = {"step": 0, "heldout": heldout | {"questions": [0, 0, 0.3, 9]}}
    trained = []
    for step in (1, 2):
        rewards = {"R_E": 0.5 + step, "em": 0.4, "imr": 0.2}
        trained.append({"step": step, **rewards, "kl": 0.01, "len": 30.0, "grad": None})
    for name, lines in {"first": [evaluated, *trained], "plain": trained}.items():
        Path(name).mkdir()
        Path(name, "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = {"average": {"em": [0.4, 0.3, 0.5]}}
    for name, tokens in {"a": 100, "b": 200}.items():
        table[name] = {"em": [0.5, 0.4, 0.6], "document_tokens": tokens}
    Path("t.json").write_text(json.dumps({"table": table}))

    runs = ["first", "plain"]
    evaluation.main(["curves", *runs, "t.json", "--out", "curves.png"])
    assert Path("curves.png").read_bytes()[:4] == b"\x89PNG"
    panels = {}
    for axes in drawn[0].axes:
        panels[axes.get_xlabel(), axes.get_title()] = axes.get_legend_handles_labels()[1]
        low, high = axes.get_ylim()
        assert all(low < y < high for line in axes.get_lines() for y in line.get_ydata())
    assert {panel: sorted(labels) for panel, labels in panels.items()} == {
        ("step", evaluation.ANSWERS): ["first", *runs],  # a line each, and dots
        ("step", evaluation.RECALLS): ["first", *runs],
        ("step", "reward of a trajectory"): runs,
        ("step", "KL to the reference, per token"): runs,
        ("step", "tokens of a response"): runs,
        ("step", "exact match of held-out questions"): ["first"],
        ("tokens of the document", evaluation.ANSWERS): ["t.json"],
    }

    Path("one.json").write_text(TABLE)  # a single length has its place on a logarithmic axis
    evaluation.main(["curves", "one.json", "--out", "one.png"])
    left, right = drawn[1].axes[0].get_xlim()
    assert 0 < left < 9 < right and right > 1.5 * left


TABLE = '{"table": {"a": {"em": [0.5, 0.4, 0.6], "document_tokens": 9}}}'


@pytest.mark.parametrize("content, out, words", [
    ("{}", "x.png", "other.json: not a table"),
    ("[1]", "x.png", "other.json: not a table"),
    ("no JSON", "x.png", "other.json: not a table"),
    ('{"table": {"E2E": {"em": [1, 1, 1]}}}', "x.png", "other.json: not a table"),
    (TABLE, "x.xyz", "--out x.xyz"),
])  # fmt: skip
def test_what_is_no_table_or_no_picture_gets_one_line(
    content, out, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("other.json").write_text(content)
    with pytest.raises(SystemExit):
        evaluation.main(["curves", "other.json", "--out", out])
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line and not Path(out).exists()


@pytest.mark.parametrize("arguments, words", [
    (["longqa"], "needs --model"),
    (["longqa", "--model", "{pocket}"], "needs --out"),
    (["filter", "--model", "{pocket}", "--out", "t.json"], "needs --data"),
    (["curves", "--out", "t.png"], "needs runs"),
    (["view", "--out", "t.html"], "needs a run"),
    (["ask", "--model", "{pocket}", "who?"], "needs --document"),
    (["forgetting", "--model", "{pocket}"], "needs --out"),
    (["longqa", "--model", "{bare}", "--out", "t.json"], "needs --data"),
    (["memtrain", "--model", "{pocket}", "--data", "{bare}"], "no documents here"),
    (["longqa", "--model", "{pocket}", "--data", "nowhere.json", "--out", "t.json"],
     "nowhere.json"),
    (["searchqa", "--model", "{pocket}", "--data", "q=x.jsonl", "--out", "t.json"], "x.jsonl"),
])  # fmt: skip
def test_bad_input_gets_one_line_and_status_2(
    arguments, words, pocket_model, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    paths = {"pocket": pocket_model, "bare": str(tmp_path)}
    with pytest.raises(SystemExit) as stopped:
        evaluation.main([argument.format(**paths) for argument in arguments])
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert stopped.value.code == 2 and words in error and not Path("t.json").exists()


@pytest.mark.parametrize("flags, words", [
    ("--batch 0", "--batch 0: 1 to"),
    ("--samples 0", "--samples 0: 1 to"),
    ("--top_p 5", "--top_p 5.0: "),
    ("--temperature -1", "--temperature -1.0: 0 or more"),
    ("--eval_documents 3", "--eval_documents: sets of questions are asked whole"),
])  # fmt: skip
def test_flags_that_make_no_sense_are_refused(flags, words):
    with pytest.raises(data.InputError, match=words):
        evaluation.parse(f"longqa --model m --out o.json {flags}".split())
