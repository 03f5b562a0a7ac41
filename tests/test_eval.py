"""eval.py: scripted models whose scores are known by hand, resuming, ranks, tables, curves."""

import doctest
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import data
import eval as evaluation
import train
from rollout import TEMPLATES, Prompts

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"


class Scripted:
    """A sampler that reads decoded prompts: remembers the sentences about the question's last word and what is not yet a whole
    sentence, and answers with the word behind 'is'; it guesses nothing."""

    def __init__(self, prompts):
        self.prompts, self.model = prompts, None

    def __call__(self, asked, limits, keys):
        responses = []
        for ids in asked:
            text = self.prompts.tokenizer.decode(ids)
            blocks = dict(re.findall(r"<(problem|memory|section)>\n(.*?)\n</\1>", text, re.DOTALL))
            subject = blocks["problem"].split()[-1].rstrip("?")
            if "section" in blocks:
                *sentences, tail = re.split(r"(?<=\.) ", blocks["memory"] + blocks["section"])  # chunks may end inside a word
                response = " ".join([*(s for s in sentences if f"{subject} is " in s), tail])
            else:
                found = re.search(rf"{subject} is (\w+)", blocks["memory"])
                response = rf"\boxed{{{found[1]}}}" if found else "I do not know."
            responses.append([*self.prompts.tokenizer(response, add_special_tokens=False)["input_ids"], self.prompts.tokenizer.eos_token_id])
        return responses


def facts(count, without=()):
    """A document of `count` facts, less those of some names, and a question about each."""
    names = [f"Name{chr(65 + i // 10)}{chr(65 + i % 10)}" for i in range(count)]
    text = " ".join(f"{name} is colour{i}." for i, name in enumerate(names) if name not in without)
    return [{"id": name, "question": f"What is {name}?", "answers": [f"colour{i}"], "context": text} for i, name in enumerate(names)]


def evaluated(tmp_path, tokenizer, rows, **flags):
    args = evaluation.parse(["longqa", "--model", "x", "--out", str(tmp_path / "table.json"), *(f"--{k}={v}" for k, v in flags.items())])
    prompts = Prompts(tokenizer, TEMPLATES)
    cfg = train.Config(chunk_tokens=24, memory_tokens=64, answer_tokens=64, max_chunks=10**9)
    (tmp_path / "table.json.parts").mkdir(exist_ok=True)
    sampler = Scripted(prompts)
    sampler.model = type("model", (), {"config": type("config", (), {"max_position_embeddings": 4096})})
    policy = train.grpo.nn.Identity()
    return evaluation.run_set(args, train.Kit(cfg, prompts, "", sampler), policy, "facts", rows)


def test_a_model_that_searches_its_memory_is_right_where_the_document_tells_and_wrong_where_it_does_not(alone, tokenizer, tmp_path):
    row = evaluation.summary(evaluated(tmp_path, tokenizer, facts(20)))
    assert row["n"] == 20 and row["em"][0] == row["sub_em"][0] == row["f1"][0] == 1.0 and row["unanswered"] == 0
    assert row["turns"] > 5  # the document took many chunks


def test_without_the_gold_sentence_every_answer_counts_as_wrong_and_none_is_missing(alone, tokenizer, tmp_path):
    rows = facts(20)
    row = evaluation.summary(evaluated(tmp_path, tokenizer, [facts(20, without={row["id"]})[i] for i, row in enumerate(rows)]))
    assert row["n"] == 20 and row["em"][0] == row["memagent_sub_em"][0] == 0.0 and row["unanswered"] == 1.0


def test_a_stopped_evaluation_goes_on_and_counts_every_sample_once(alone, tokenizer, tmp_path, monkeypatch):
    whole = evaluated(tmp_path, tokenizer, facts(8), samples=2)
    parts = tmp_path / "table.json.parts" / "facts.rank0.jsonl"
    lines = parts.read_text().splitlines(keepends=True)
    parts.write_text("".join(lines[:5]) + lines[5][:20])  # killed while the sixth line was being written
    again = evaluated(tmp_path, tokenizer, facts(8), samples=2)
    strip = lambda records: [{k: v for k, v in record.items() if k != "seconds"} for record in records]  # noqa: E731
    assert strip(again) == strip(whole) and len(whole) == 16


def run(arguments, cwd, ranks=1):
    script = [str(ROOT / "eval.py"), *arguments]
    if ranks > 1:
        script = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), *script]
    return subprocess.run([sys.executable, *script], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=cwd, timeout=300)


def test_two_ranks_give_the_table_of_one_with_sampling(pocket_model, tmp_path):
    tables = []
    for ranks in (1, 2):
        out = f"ranks{ranks}.json"
        done = run(["longqa", "--model", pocket_model, "--chunks", "1", "--eval_documents", "6", "--out", out], tmp_path, ranks)
        assert done.returncode == 0, done.stderr[-2000:]
        table = json.loads((tmp_path / out).read_text())["table"]
        tables.append({name: {k: v for k, v in row.items() if k != "seconds"} for name, row in table.items()})
    assert tables[0] == tables[1] and len(tables[0]) == 5 and tables[0]["1 chunks"]["n"] == 6


def test_memtrain_prints_held_out_figures_with_intervals(pocket_model, tmp_path):
    done = run(["memtrain", "--model", pocket_model, "--eval_documents", "8", "--out", "proxy.json"], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| E2E" in done.stdout and "| recall" in done.stdout
    table = json.loads((tmp_path / "proxy.json").read_text())
    assert table["E2E"]["n"] == 8 and table["E2E"]["em"][1] <= table["E2E"]["em"][0] <= table["E2E"]["em"][2]


def test_a_whole_document_is_cut_in_the_middle_to_the_context_and_says_so(tokenizer):
    prompts = Prompts(tokenizer, TEMPLATES)
    kit = train.Kit(train.Config(answer_tokens=16), prompts, "", None)
    text = " ".join(f"word{i}" for i in range(400))
    row = {"question": "Which?", "context": text}
    whole, cut = evaluation.whole_document(kit, row, 10**6, (0,))
    assert not cut and text in prompts.text(whole.ids)
    short, cut = evaluation.whole_document(kit, row, 512, (0,))
    assert cut and len(short.ids) + 16 == 512 and "word0 " in prompts.text(short.ids) and "word399" in prompts.text(short.ids)


def test_the_examples_in_the_docstrings_hold():
    for module in (evaluation, train):
        result = doctest.testmod(module)
        assert result.attempted and not result.failed


def test_the_interval_is_wilsons_and_stays_inside():
    mean, low, high, n = train.interval([1.0] * 3 + [0.0])
    assert (mean, n) == (0.75, 4) and low == pytest.approx(0.3006, abs=1e-4) and high == pytest.approx(0.9544, abs=1e-4)
    assert train.interval([0.0] * 10)[2] == pytest.approx(0.2775, abs=1e-4) and train.interval([0.0] * 10)[1] == 0


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
@pytest.mark.parametrize("file, documents", [("rulerhqa_shaped_50.json", 50), ("rulerhqa_shaped_200.json", 200)])
def test_evaluation_files_of_memagents_shape_load_whole(file, documents):
    rows = data.load_questions(str(SHARED / file))
    assert all(row["context"].count("Document ") >= documents and row["answers"] and isinstance(row["answers"], list) for row in rows)


def test_curves_draw_runs_and_tables(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is optional")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text('{"step": 0, "heldout": {"trajectory": [0.1, 0.0, 0.2, 9]}}\n{"step": 1, "R_E": 0.5, "em": 0.4}\n')
    (tmp_path / "table.json").write_text(json.dumps({"table": {"a": {"em": [0.5, 0.4, 0.6], "tokens": 100}, "b": {"em": [0.4, 0.3, 0.5], "tokens": 200}}}))
    evaluation.main(["curves", str(run_dir), str(tmp_path / "table.json"), "--out", str(tmp_path / "curves.png")])
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("arguments, words", [
    (["longqa"], "needs --model"),
    (["longqa", "--model", "{pocket}"], "needs --out"),
    (["longqa", "--model", "{pocket}", "--data", "nowhere.json", "--out", "t.json"], "nowhere.json"),
    (["searchqa", "--model", "{pocket}", "--data", "q=x.jsonl", "--out", "t.json"], "x.jsonl"),
])  # fmt: skip
def test_bad_input_gets_one_line_and_status_2(arguments, words, pocket_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        evaluation.main([a.format(pocket=pocket_model) for a in arguments])
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert stopped.value.code == 2 and len(error) == 1 and words in error[0] and not Path("t.json").exists()
