"""Looking into memories: transcripts, eval.py ask, view, forgetting, and the page in a browser."""

import html.parser
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen3Config

import data
import distributed
import eval as evaluation
import pocket
import rollout
import train
import warm_start
from rollout import Prompts, Reader, Response

ROOT = Path(__file__).parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
browser = pytest.mark.skipif(
    CHROMIUM is None, reason="needs chromium (Debian: apt install chromium)"
)
HOSTILE = (
    "</script></pre></article><script>document.title='owned'</script>"
    "<img src=x onerror=\"document.title='owned'\">"
    " & &amp; <!-- שלום \u202eevil مرحبا 👩\u200d👩\u200d👧 e\u0301 漢字，漢字 "
    "\x1b[2J \u2028 ]]> ${x} %(title)s {0} \\1"
)


def pocket_setup(respond, task="memtrain", **settings):
    """A Setup of the pocket world in which `respond` (memory, section, problem), words each, gives
    the words of every response; None for what a prompt lacks."""
    prompts = Prompts(pocket.tokenizer(), pocket.TEMPLATES, pocket.PROBLEM)

    def sampler(asked, limits, keys):
        responses = []
        for ids in asked:
            text = [pocket.VOCABULARY[i] for i in ids]
            blocks = [warm_start.block(text, tag) for tag in ("memory", "section", "problem")]
            words = respond(*blocks)
            words = [*words, "<|im_end|>"]
            responses.append(Response([pocket.ID[word] for word in words]))
        return responses

    cfg = train.Config(**pocket.SETTINGS | {"task": task, "max_chunks": 10**9} | settings)
    return train.Setup(cfg, prompts, sampler)


def keeps(facts):
    """A respond(memory, section, problem) that keeps, and answers from, the last `facts` facts."""

    def respond(memory, section, problem):
        known = warm_start.read(memory)
        if section is not None and problem is not None:
            return sum((known + warm_start.read(section))[-facts:], [])
        hidden = (
            [fact for fact in warm_start.read(section) if data.TARGET in fact]
            if section
            else [[problem[0], "", ""]]
        )
        for fact in known:
            alike = [i for i in range(3) if hidden[0][i] == fact[i]]
            if section and len(alike) == 2:
                return ["\\boxed{", fact[3 - sum(alike)], "}"]
            if problem and fact[:2] == problem[:2]:
                return ["\\boxed{", fact[2], "}"]
        return ["\\boxed{", "}"]

    return respond


# -------------------------------------------------------------------------------------- transcripts


def test_a_transcript_holds_the_sections_memories_recalls_rewards_and_advantages():
    setup = pocket_setup(keeps(4), group=3, recalls=2, recall_draw="trajectory")
    row = pocket.documents(1, "transcript")[0]
    groups = train.memtrain(setup, {5: row}, 0)
    record = json.loads(json.dumps(train.transcript(setup, groups, 1, 5, row)))
    assert (record["step"], record["id"], record["golds"]) == (1, row["id"], [row["answer"]])
    assert record["question"] == row["question"]

    # the spans make up the document; memories are what was written
    sections = [record["document"][a:b] for a, b in record["sections"]]
    assert "".join(sections) == record["document"] == row["text"] and len(sections) == pocket.CHUNKS
    *memories, answer = record["turns"]
    reader = groups[-1].agents[0]
    assert memories == [setup.prompts.text(memory) for memory in reader.memories[1:]]
    assert answer == record["answers"][0] == reader.answer and len(record["answers"]) == 3

    # every recall says where it was drawn, and shows the section with the entity hidden
    assert [recall["trajectory"] for recall in record["recalls"]] == [0, 1, 2]
    for recall in record["recalls"]:
        assert 1 <= recall["l"] < recall["k"] <= len(sections)
        assert recall["target"] in sections[recall["l"] - 1].split()
        section = sections[recall["l"] - 1].replace(recall["target"], data.TARGET).split()
        assert (
            " ".join(section) in recall["prompt"] and memories[recall["k"] - 1] in recall["prompt"]
        )
        assert len(recall["answers"]) == len(recall["rewards"]) == 2
    shown = evaluation.article(record).split('<div class="turn">')[1:]
    for recall in record["recalls"]:
        assert f'<mark class="target">{recall["target"]}</mark>' in shown[recall["l"] - 1]
    for group in (record, *record["recalls"]):
        mean = sum(group["rewards"]) / len(group["rewards"])
        assert group["advantages"] == pytest.approx([reward - mean for reward in group["rewards"]])


def test_a_search_is_transcribed_with_what_every_turn_saw():
    row = pocket.search_questions(1, 0)[0] | {"answers": [["tea"]]}
    setup = pocket_setup(
        lambda *blocks: "<think> </think> <answer> tea </answer>".split(), "searchqa"
    )
    groups = train.searchqa(setup, {0: row}, 0)
    record = train.transcript(setup, groups, 1, 0, row)
    assert len(record["prompts"]) == len(record["turns"]) == 1
    assert row["question"] in record["prompts"][0]
    assert record["golds"] == [["tea"]] and record["exact_match"][0] == 1.0
    assert "document" not in record
    page = evaluation.article(record)
    assert "<h4>prompt 1</h4>" in page and "<h4>section 1</h4>" not in page


def test_a_lone_surrogate_in_a_document_or_an_answer_ends_no_transcript(tmp_path):
    train.append(tmp_path / "samples.jsonl", [{"step": 1, "golds": ["a\ud800b", "שלום"]}])
    assert json.loads((tmp_path / "samples.jsonl").read_text())["golds"] == ["a?b", "שלום"]


# ---------------------------------------------------------------------------------------------- ask


@pytest.fixture
def scripted(monkeypatch):
    """eval.py with a scripted model of the pocket world; -> the function that sets what it does."""

    def use(respond, **settings):
        def open_model(args, cfg):
            distributed.start_ranks()
            policy = torch.nn.Module()
            policy.lm = SimpleNamespace(config=Qwen3Config(max_position_embeddings=4096))
            return pocket_setup(respond, cfg.task, **settings), policy

        monkeypatch.setattr(evaluation, "open_model", open_model)

    return use


DOCUMENT = "Ada sells tea\nBen faces river\nDan honours wolf\nEve sells figs\n"


def test_ask_reads_every_section_shows_every_memory_and_answers_every_question(
    scripted, pocket_model, tmp_path, capsys
):
    scripted(keeps(3))
    (tmp_path / "doc.md").write_text(DOCUMENT)
    flags = ["--model", pocket_model, "--document", str(tmp_path / "doc.md")]
    evaluation.main(["ask", *flags, "Dan honours what ?", "Ada sells what ?"])
    shown = capsys.readouterr().out
    assert (
        "12 tokens, 2 sections of at most 6, read 2 times: a memory depends on its question"
        in shown
    )
    memories = re.findall(r"--- question (\d), memory after section (\d) of 2\n(.*)\n", shown)
    assert [memory[:2] for memory in memories] == [
        (question, section) for section in "12" for question in "12"
    ]
    assert memories[0][2] == "Ada sells tea Ben faces river"
    assert memories[2][2] == "Ben faces river Dan honours wolf Eve sells figs"
    assert "question: Dan honours what ?\nanswer:   wolf\n" in shown
    assert "question: Ada sells what ?\nanswer:   \\boxed{ }\n" in shown  # dropped by then

    # one question, the answer alone
    evaluation.main(["ask", "Dan honours what ?", *flags, "--quiet"])
    assert capsys.readouterr().out == "wolf\n"


def test_ask_writes_a_page_with_the_memories_of_every_question(
    scripted, pocket_model, tmp_path, capsys
):
    scripted(keeps(3))
    (tmp_path / "doc.txt").write_text("\ufeff" + DOCUMENT)  # a byte order mark is no text
    flags = ["--model", pocket_model, "--document", str(tmp_path / "doc.txt"), "--quiet"]
    evaluation.main([
        "ask", *flags, "Dan honours what ?", "Eve sells what ?", "--html", str(tmp_path / "a.html"),
    ])  # fmt: skip
    assert capsys.readouterr().out.splitlines()[:2] == ["wolf", "figs"]
    page = (tmp_path / "a.html").read_text()
    assert page.count("<article") == 2 and "question 2" in page and "advantage" not in page
    assert "<ins>Ada sells tea Ben faces river</ins>" in page
    assert "<ins>Dan honours wolf Eve sells figs</ins>" in page


@pytest.mark.parametrize("flags", [[], ["--mode", "full_context"], ["--quiet"]])
def test_ask_reads_what_comes_in_with_a_model_of_transformers(
    flags, pocket_model, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(DOCUMENT.encode())))
    evaluation.main(["ask", "--model", pocket_model, "--document", "-", *flags, "Ada sells what ?"])
    shown = capsys.readouterr().out
    if flags == ["--quiet"]:
        assert len(shown.splitlines()) == 1
    else:
        assert "-: 12 tokens, 2 sections of at most 6\n" in shown and "\nanswer: " in shown
        assert shown.count("--- question 1, memory") == (0 if flags else 2)


@pytest.mark.parametrize("content, question, words", [
    (None, "Who?", "No such file"),
    (b"", "Who?", "holds no text"),
    (b" \n\t\n", "Who?", "holds no text"),
    (b"\x7fELF\x00\x00", "Who?", "holds no text"),
    (b"caf\xe9", "Who?", "position 3"),
    (b"text", "  ", "a question is empty"),
    (b"text", None, "ask needs a question"),
])  # fmt: skip
def test_a_document_that_is_no_text_or_an_empty_question_gets_one_line(
    content, question, words, pocket_model, tmp_path, capsys
):
    file = tmp_path / "document.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        asked = [question] if question else []
        evaluation.main(["ask", "--model", pocket_model, "--document", str(file), *asked])
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and line.startswith("error: ") and words in line


def test_the_prompts_sent_as_text_are_what_a_reader_sends_as_ids(tokenizer):
    """The loop for a server: templates with their fields replaced, one message a turn."""
    prompts = Prompts(tokenizer)
    sections = [
        chunk.ids for chunk in data.chunks("Rome is old.\nOslo is not. " * 9, tokenizer, 40)
    ]
    reader = Reader(prompts, prompts.encode("Which is old?"), sections, 64, 64, (0,))

    def as_text(name, **fields):
        text = re.sub(r"\{(\w+)\}", lambda field: fields[field[1]], rollout.TEMPLATES[name])
        chat = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )

    memory = rollout.NO_MEMORY
    for section in sections:
        sent = as_text(
            "update", problem="Which is old?", memory=memory, section=tokenizer.decode(section)
        )
        assert tokenizer.decode(reader.prompt()[0]) == sent
        memory += " Rome."
        reader.receive([*prompts.encode(memory), tokenizer.eos_token_id])
    assert tokenizer.decode(reader.prompt()[0]) == as_text(
        "answer", problem="Which is old?", memory=memory
    )


# --------------------------------------------------------------------------------------------- view


def hostile_record():
    """A transcript in which everything that a document or a model may write is hostile."""
    text = f"Rome {HOSTILE} [MASK]\n"
    recall = {
        "trajectory": 0, "k": 2, "l": 1, "target": "<img", "prompt": HOSTILE, "answers": [HOSTILE],
    }  # fmt: skip
    recall |= {"exact_match": [0.0], "rewards": [0.0], "advantages": [0.0]}
    return {
        "step": 3, "id": HOSTILE, "question": HOSTILE, "golds": ["Rome", "", "lt", "\\"],
        "document": text * 2, "sections": [[0, len(text)], [len(text), 2 * len(text)]],
        "turns": [HOSTILE, "\ud83d " + HOSTILE, HOSTILE], "answers": [HOSTILE, None],
        "exact_match": [0.0, 1.0], "rewards": [0.0, 1.0], "advantages": [-0.5, 0.5],
        "recalls": [recall],
    }  # fmt: skip


class Texts(html.parser.HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)

    def handle_data(self, text):
        self.text += text


def written(records, folder):
    file = folder / "samples.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    evaluation.main(["view", str(folder), "--out", str(folder / "page.html")])
    return (folder / "page.html").read_text()


def test_text_that_looks_like_markup_is_shown_as_text(tmp_path):
    page = Texts(written([hostile_record()], tmp_path))
    assert page.text.count(HOSTILE) >= 2 + 2 + 2 + 1  # id, question; sections; memories; prompt
    assert not {"script", "img"} & set(page.tags) and page.tags.count("article") == 1


def test_a_page_needs_nothing_from_elsewhere_and_runs_no_script(tmp_path):
    page = written([hostile_record()], tmp_path)
    assert not re.search(r"<script|<link|<img|<iframe|@import|url\(|src=[\"']", page)


def test_marks_stand_where_masks_targets_and_answers_do():
    assert (
        evaluation.marked("<b> Rome", {"Rome": "gold"})
        == '&lt;b&gt; <mark class="gold">Rome</mark>'
    )
    assert evaluation.marked("[MASK] saw Romeo") == '<mark class="mask">[MASK]</mark> saw Romeo'
    both = evaluation.marked("New York, York", {"York": "gold", "New York": "target", "": "gold"})
    assert both == '<mark class="target">New York</mark>, <mark class="gold">York</mark>'


@pytest.mark.parametrize("before, after, page", [
    ("", "a b", "<del></del><ins>a b</ins>"),
    ("a b", "a b", "a b"),
    ("a b", "a c", "a <del>b</del><ins>c</ins>"),
    ("a b", "a b c", "a b <del></del><ins>c</ins>"),
    ("a b c", "a c", "a <del>b</del><ins></ins>c"),
    ("漢字，漢", "漢字，字", "漢字，<del>漢</del><ins>字</ins>"),
])  # fmt: skip
def test_what_a_memory_adds_and_drops_is_marked(before, after, page):
    assert evaluation.changed(before, after) == page


def test_of_a_long_run_transcripts_are_spread_evenly_and_the_page_says_so(tmp_path, capsys):
    records = [hostile_record() | {"step": 1 + i // 2} for i in range(200)]
    page = written(records, tmp_path)
    steps = list(map(int, re.findall(r'<a href="#t\d+">step (\d+)</a>', page)))
    assert len(steps) == page.count("<article") == evaluation.VIEWED
    assert (steps[0], steps[-1]) == (1, 100)
    assert "48 of 200 transcripts" in capsys.readouterr().out


@pytest.mark.parametrize("lines", ["", '{"step": 1, "turns": []}\n', "{"])
def test_what_holds_no_transcripts_gets_one_line(lines, tmp_path, capsys):
    (tmp_path / "samples.jsonl").write_text(lines)
    for where in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SystemExit):
            evaluation.main(["view", str(where), "--out", str(tmp_path / "page.html")])
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and not (tmp_path / "page.html").exists()


def in_chromium(page, folder, *flags):
    """Opens a page, #anchor included, in headless Chromium; -> what it prints."""
    quiet = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-sync",
    ]  # fmt: skip
    quiet += [
        "--disable-background-networking", "--disable-component-update",
        f"--user-data-dir={folder / 'profile'}",
    ]  # fmt: skip
    done = subprocess.run(
        [CHROMIUM, *quiet, *flags, f"file://{page}"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@browser
def test_a_browser_shows_hostile_text_as_text(tmp_path):
    written([hostile_record()], tmp_path)
    page = Texts(in_chromium(tmp_path / "page.html", tmp_path, "--dump-dom"))
    assert not {"script", "img"} & set(page.tags) and page.tags.count("article") == 1
    assert page.text.count("<script>document.title='owned'</script>") >= 10
    assert page.text.strip().startswith(str(tmp_path))  # the title is still the page's own


@browser
def test_a_browser_shows_the_pages_of_a_pocket_run_one_by_one(
    pocket_model, tmp_path, monkeypatch, signals
):
    monkeypatch.chdir(tmp_path)
    sizes = [
        "--steps", "2", "--documents_per_step", "2", "--documents_per_update", "2", "--group", "2",
    ]  # fmt: skip
    train.main(
        ["--model", pocket_model, *sizes, "--recalls", "2", "--eval_documents", "0", "--out", "run"]
    )
    evaluation.main(["view", "run", "--out", "page.html"])
    pixels = set()
    for number in range(4):
        shot = tmp_path / f"{number}.png"
        in_chromium(
            f"{tmp_path / 'page.html'}#t{number}", tmp_path,
            f"--screenshot={shot}", "--window-size=400,900",
        )  # fmt: skip
        pixels.add(shot.read_bytes())
    assert len(pixels) == 4  # each anchor shows its own transcript
    page = Texts(in_chromium(tmp_path / "page.html", tmp_path, "--dump-dom"))
    assert page.tags.count("article") == 4 and page.tags.count("table") == 4 * (1 + 2)
    in_chromium(tmp_path / "page.html", tmp_path, f"--print-to-pdf={tmp_path / 'page.pdf'}")
    assert (tmp_path / "page.pdf").read_bytes()[:4] == b"%PDF"


# --------------------------------------------------------------------------------------- forgetting


def forgetting_of(respond, documents, **settings):
    """The table of a scripted model, on these documents."""
    recalls = evaluation.recalls_by_age(
        pocket_setup(respond, **settings), dict(enumerate(documents))
    )
    return evaluation.forgetting_table(recalls)


def means(table, name):
    return {age: row[0] for age, row in table[name].items()}


def test_a_memory_of_everything_captures_and_retains_everything():
    table = forgetting_of(keeps(99), pocket.documents(8, "forgetting", 4))
    assert means(table, "written") == dict.fromkeys(range(4), 1.0)
    assert means(table, "no memory") == {0: 0.0}
    # two may sell the same thing: a hidden one can't always be told from the other
    assert means(table, "capture")[0] > 0.9
    assert means(table, "retention")[1] > 0.9 and means(table, "retention")[3] > 0.9


def test_a_memory_of_two_sections_captures_everything_and_forgets_it_two_turns_later():
    table = forgetting_of(keeps(2 * pocket.FACTS_PER_CHUNK), pocket.documents(8, "forgetting", 4))
    assert means(table, "written") == {0: 1.0, 1: 1.0, 2: 0.0, 3: 0.0}
    assert means(table, "recall")[0] > 0.9
    assert means(table, "recall")[2] == means(table, "recall")[3] == 0.0
    assert means(table, "retention")[1] > 0.9 and means(table, "retention")[2] == 0.0
    assert table["retention"][1][3] == 8  # n: documents


def test_a_memory_of_the_first_facts_captures_little_and_retains_it():
    last = keeps(99)

    def first(memory, section, problem):
        if section is not None and problem is not None:
            facts = warm_start.read(memory) + warm_start.read(section)
            return sum(facts[: pocket.FACTS_PER_CHUNK], [])
        return last(memory, section, problem)

    table = forgetting_of(first, pocket.documents(8, "forgetting", 4))
    assert 0.15 < table["capture"][0][0] < 0.3
    assert means(table, "retention") == {1: 1.0, 2: 1.0, 3: 1.0}


def test_what_is_known_without_a_memory_is_no_capture():
    documents = pocket.documents(4, "forgetting")
    facts = sum((warm_start.read(row["text"].split()) for row in documents), [])

    asked = []

    def knows(memory, section, problem):
        if section is None or problem is not None:
            return []
        asked.append(memory)
        (hidden,) = [fact for fact in warm_start.read(section) if data.TARGET in fact]
        for first in range(0, len(facts), pocket.FACTS_PER_CHUNK):
            part = facts[first : first + pocket.FACTS_PER_CHUNK]
            left = [fact for fact in part if fact not in warm_start.read(section)]
            if len(left) == 1:  # the one fact of this section that is not shown
                return ["\\boxed{", *(a for a, b in zip(left[0], hidden) if a != b), "}"]

    table = forgetting_of(knows, documents[:1])
    assert means(table, "no memory") == {0: 1.0} and means(table, "recall")[2] == 1.0
    assert means(table, "written")[2] == 0.0
    assert table["capture"] == table["retention"] == {}
    assert "No previous memory".split() in asked and [] in asked


def test_entities_that_stand_in_another_section_too_are_not_asked_for():
    text = "Rome saw Oslo. Rome saw Bergen. "
    row = {"text": text, "entities": [[0, 4], [9, 13], [15, 19], [24, 30]], "answer": "x"}
    first, second = data.Chunk([], 0, 15), data.Chunk([], 15, len(text))
    assert evaluation.entities_of(row, first) == [[9, 13]]
    assert evaluation.entities_of(row, second) == [[24, 30]]
    told = "Ada sells tea\nBen faces river\nCleo grows rye\n" * 2  # two sections that are alike
    words = [list(word.span()) for word in re.finditer(r"Ada|tea|Ben|river", told)]
    again = {"id": "0", "text": told, "entities": words, "answer": "Rhun"}
    assert evaluation.recalls_by_age(pocket_setup(keeps(4)), {0: again}) == []


def test_shares_are_of_documents_and_only_the_captured_are_retained():
    right, wrong = (1.0, 1.0), (0.0, 0.0)
    recalls = [  # (document, EM without a memory, by age)
        ("a", 0.0, {0: right, 1: wrong}),
        ("a", 0.0, {0: right, 1: (1.0, 0.0)}),
        ("a", 0.0, {0: wrong}),
        ("b", 1.0, {0: right, 1: right}),
        ("b", 0.0, {0: wrong, 1: (1.0, 0.0)}),
    ]
    table = evaluation.forgetting_table(recalls)
    assert table["no memory"][0] == list(train.interval([0.0, 0.5]))
    assert table["capture"][0] == list(train.interval([2 / 3, 0.0]))
    assert table["retention"] == {1: list(train.interval([0.5]))}
    assert table["recall"][1] == list(train.interval([0.5, 1.0]))
    assert table["written"][1] == list(train.interval([0.0, 0.5]))


def test_the_forgetting_of_two_ranks_is_that_of_one(pocket_model, tmp_path):
    tables = []
    for ranks in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        flags = ["forgetting", "--model", pocket_model, "--eval_documents", "5", "--batch", "2"]
        command = [sys.executable, *launch, str(ROOT / "eval.py"), *flags, "--out", f"{ranks}.json"]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
        tables.append(json.loads((tmp_path / f"{ranks}.json").read_text())["forgetting"])
    assert tables[0] == tables[1] and tables[0]["recall"]["0"][3] == 5


def test_forgetting_is_drawn_alone_and_several_models_side_by_side(
    scripted, pocket_model, tmp_path, capsys
):
    for name, facts in {"short": 2, "long": 8}.items():
        scripted(keeps(facts))
        flags = [
            "--model", pocket_model, "--eval_documents", "4",
            "--out", str(tmp_path / f"{name}.json"),
        ]  # fmt: skip
        evaluation.main(["forgetting", *flags, "--png", str(tmp_path / f"{name}.png")])
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    shown = capsys.readouterr().out
    assert "| recall, age 3 " in shown and "| retention, age 3 " in shown
    tables = [str(tmp_path / name) for name in ("short.json", "long.json")]
    evaluation.main(["curves", *tables, "--out", str(tmp_path / "both.png")])
    assert (tmp_path / "both.png").read_bytes()[:4] == b"\x89PNG"
