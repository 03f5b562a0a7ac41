"""Meeting the authors' released code: its files, its recipe, its recall, its arithmetic."""

import json
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import tiny_model

import data
import distributed
import eval as evaluation
import rewards
import rollout
import train
from data import MASK, TARGET, DataError

REAL = Path(__file__).parents[2] / "shared" / "data"
real = pytest.mark.skipif(not REAL.exists(), reason="needs the samples in ../shared/data")

QUESTION = "What does [MASK] stand for, judging by all of it?"
NAMES = ["Ada Lovelace", "Alan Turing", "Grace Hopper", "Emmy Noether", "Paul Erdos"]


def masked_row(number=0, passages=6):
    """A row in the columns of the released training file."""
    texts = []
    for p in range(passages):
        who, other = NAMES[(number + p) % 5], NAMES[(number + p + 2) % 5]
        texts.append(
            f"Life {p}\nIn {1800 + p} {who} met {other} in {MASK}. They wrote {p} letters."
        )
    context = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(texts, 1))
    return {
        "data_source": "hotpotqa",
        "prompt": [{"content": QUESTION, "role": "user"}],
        "context": context,
        "ability": "memory",
        "reward_model": {"ground_truth": ["Paris"], "style": "rule"},
        "extra_info": {"index": number, "num_docs": passages, "question": QUESTION},
    }


def pairs_row(number=0):
    """A row in the columns of the released search training file."""
    joined = f"Who is {number}?; Where; or when, is {number}?"
    return {
        "data_source": "nq_hotpotqa",
        "prompt": [
            {
                "content": f"Search; then answer.\n\nAnswer these questions: {joined}\n",
                "role": "user",
            }
        ],
        "ability": "fact-reasoning",
        "reward_model": {"style": "rule", "ground_truth": {"target": [["Ann", "Anna"], ["Rome"]]}},
        "extra_info": {"index": number, "split": "train", "question": joined},
    }


def write(path, rows):
    """Rows as .parquet or .jsonl. -> the path as text"""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def changed(row, name, value):
    """The row with another value in a field; "a.b" is a field of a struct."""
    first, _, rest = name.partition(".")
    return row | {first: changed(row[first] or {}, rest, value) if rest else value}


# --------------------------------------------------------------------------------- masked documents


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_a_file_of_masked_documents_keeps_text_answer_and_question_and_gets_entities(ending, here):
    rows = [masked_row(number) for number in range(3)]
    path = write(here / f"mask.{ending}", rows)
    assert data.holds_documents(path)
    documents = list(data.load_documents(path, "train", "rules"))
    assert [document["id"] for document in documents] == ["0", "1", "2"]
    for row, document in zip(rows, documents, strict=True):
        found = document["text"], document["answer"], document["question"]
        assert found == (row["context"], "Paris", QUESTION)
        names = Counter(document["text"][a:b] for a, b in document["entities"])
        assert (
            names["Ada Lovelace"] == row["context"].count("Ada Lovelace") > 1 and names["1803"] == 1
        )
        assert not {"Document 1", "Document", "MASK"} & set(names)
    assert len(data.load_documents(path, "heldout", "rules")) == 0


def test_entities_are_those_of_every_passage_by_itself_moved_to_where_it_stands(here):
    path = write(here / "mask.parquet", [masked_row(number, 9) for number in range(4)])
    for document in data.load_documents(path, "train", "rules"):
        # the passages as they stand, and where
        passages, starts, offset = [], [], 0
        for number, passage in enumerate(document["text"].split("\n\n"), 1):
            heading = f"Document {number}:\n"
            passages.append(passage.removeprefix(heading))
            starts.append(offset + len(heading))
            offset += len(passage) + 2
        expected = []
        for start, spans in zip(starts, data.find_entities(passages, "rules"), strict=True):
            expected += [[start + a, start + b] for a, b in spans]
        assert document["entities"] == expected


def test_entities_of_a_file_are_found_once_for_its_content_and_pipeline(here, monkeypatch, capsys):
    looked, plain = [], data.find_entities
    monkeypatch.setattr(
        data, "find_entities", lambda texts, *rest: looked.append(texts) or plain(texts, *rest)
    )
    rows = [masked_row(0)] * 5
    first = data.import_documents(write(here / "mask.parquet", rows), "rules")
    assert "5 documents, 0.0 minutes" in capsys.readouterr().err
    assert (
        len(looked) == 1 and len(looked[0]) == 6
    )  # each passage once, though five documents hold it
    write(here / "copy.parquet", rows)
    assert (
        data.import_documents("mask.parquet", "rules")
        == first
        == data.import_documents("copy.parquet", "rules")
    )
    assert len(looked) == 1 and first.parts[0] == "cache"
    other = data.import_documents(write(here / "mask.parquet", [masked_row(1)]), "rules")
    assert len(looked) == 2 and other != first


def test_an_answer_that_still_stands_in_its_text_is_counted_and_said(here, capsys):
    rows = [masked_row(0), changed(masked_row(1), "reward_model.ground_truth", ["Alan Turing"])]
    data.import_documents(write(here / "mask.parquet", rows), "rules")
    assert "the answers of 1 still stand in their text" in capsys.readouterr().err


BAD_DOCUMENTS = {
    "no answer": ("reward_model.ground_truth", []),
    "an empty answer": ("reward_model.ground_truth", [" "]),
    "an answer of None": ("reward_model.ground_truth", None),
    "no reward_model": ("reward_model", None),
    "two answers": ("reward_model.ground_truth", ["Paris", "Rome"]),
    "no context": ("context", None),
    "a blank context": ("context", "  "),
    "no mask": ("context", "Document 1:\nAnn ran."),
    "the placeholder of recalls": ("context", f"{MASK} met {TARGET}."),
}


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
@pytest.mark.parametrize("how", BAD_DOCUMENTS)
def test_a_row_that_is_no_masked_document_is_named_and_nothing_is_kept(how, ending, here):
    bad = changed(masked_row(1), *BAD_DOCUMENTS[how])
    path = write(here / f"mask.{ending}", [masked_row(0), bad])
    place = "mask.parquet: row 2: " if ending == "parquet" else "mask.jsonl:2: "
    with pytest.raises(DataError, match=place) as error:
        data.load_documents(path, "train", "rules")
    assert "\n" not in str(error.value) and not Path("cache").exists()


def test_a_masked_document_without_any_question_is_refused(here):
    row = changed(changed(masked_row(), "extra_info.question", None), "prompt", [])
    with pytest.raises(DataError, match="jsonl:1: no question"):
        data.load_documents(write(here / "mask.jsonl", [row]), "train", "rules")


def test_ordinary_questions_are_no_masked_documents(here):
    path = write(
        here / "q.jsonl", [{"question": "Who?", "answers": ["Ann"], "context": "Ann ran."}]
    )
    assert not data.holds_documents(path)
    with pytest.raises(DataError, match=r"q.jsonl:1: no \[MASK\] in its context"):
        data.load_documents(path, "train", "rules")


@pytest.fixture
def model(tokenizer, here):
    """A folder with a random model that reads any text."""
    sizes = dict(max_position_embeddings=2048, eos_token_id=tokenizer.eos_token_id)
    tiny_model(vocab_size=len(tokenizer), **sizes).save_pretrained("model")
    tokenizer.save_pretrained("model")
    return "model"


def test_memtrain_trains_on_the_released_file_and_looks_at_another(model, here, signals):
    write(here / "mask.parquet", [masked_row(number) for number in range(4)])
    write(here / "dev.parquet", [masked_row(number) for number in range(7, 10)])
    write(
        here / "qa.jsonl", [{"question": "Who ran?", "answers": ["Ann"], "context": "Ann ran."}] * 2
    )
    flags = "--model model --data mask.parquet --heldout dev.parquet qa.jsonl --ner rules"
    flags += " --recipe released --steps 1 --documents_per_step 2 --documents_per_update 2"
    flags += " --group 2 --recalls 2"
    flags += " --chunk_tokens 64 --memory_tokens 4 --answer_tokens 4 --eval_documents 3 --out run"
    train.main(flags.split())
    first, last = train.read_metrics("run")
    assert {kind: score[3] for kind, score in first["heldout"].items()} == {
        "trajectory": 3, "recall": 3, "questions": 2,
    }  # fmt: skip
    assert "imr" in last and last["turns"] > 2
    sample = json.loads(Path("run/samples.jsonl").read_text().splitlines()[0])
    assert sample["golds"] == ["Paris"]
    config = json.loads(Path("run/config.json").read_text())["config"]
    assert (config["recall_window"], config["match"], config["dual_clip"]) == (
        "before",
        "math",
        3.0,
    )


# ------------------------------------------------------------------------------------------- export


def documents(count=3):
    found = []
    for number in range(count):
        text = f"Ann {number}\nShe met {MASK}.\n\nBob\nHe knew {MASK} and Ann {number}."
        text += "\n\nRome is old."
        document = {
            "id": f"train-{number:06d}",
            "text": text,
            "answer": "Paris",
            "entities": [[0, 3]],
        }
        found.append(document | {"question": QUESTION if number == 1 else None})
    return found


def exported(folder, rows):
    data.save_documents(folder / "docs", {"train": iter(rows), "heldout": iter([])})
    assert not data.main(["export", str(folder / "docs"), "--out", str(folder / "out.parquet")])
    return str(folder / "out.parquet")


def test_a_folder_that_holds_nothing_out_is_no_held_out_set(here):
    exported(here, documents())
    assert len(train.read_documents(train.Config(), "docs", "train")) == 3
    with pytest.raises(distributed.InputError, match="docs: none held out"):
        train.heldout_documents(train.Config(), "docs")


def test_what_was_exported_comes_back_with_text_answer_and_question(here):
    back = list(data.load_documents(exported(here, documents()), "train", "rules"))
    for document, own in zip(documents(), back, strict=True):
        for name in ("id", "text", "answer"):
            assert own[name] == document[name]
        assert own["question"] == document["question"] or own["question"] == data.QUESTION


def test_an_export_has_the_columns_and_the_layout_of_the_released_file(here):
    rows = [row for _, row in data.read_rows(exported(here, documents(70)))]  # more than one group
    assert len(rows) == 70 and list(rows[0]) == list(masked_row())
    row = rows[1]
    assert row["context"].startswith(f"Document 1:\nAnn 1\nShe met {MASK}.\n\nDocument 2:\nBob\nHe")
    assert row["prompt"] == [{"content": QUESTION, "role": "user"}]
    assert row["reward_model"] == {"ground_truth": ["Paris"], "style": "rule"}
    assert (row["extra_info"]["index"], row["extra_info"]["num_docs"]) == (1, 3)
    assert rows[0]["extra_info"]["question"] == rollout.PROBLEM == data.QUESTION


def test_a_text_with_headings_of_its_own_is_exported_as_it_is(here):
    path = write(here / "mask.parquet", [masked_row(0)])
    rows = list(data.load_documents(path, "train", "rules"))
    [row] = [row for _, row in data.read_rows(exported(here, rows))]
    assert row["context"] == masked_row(0)["context"]


@real
def test_the_real_sample_loads_and_an_export_has_its_columns(here):
    import pyarrow.parquet

    path = str(REAL / "released_shaped_mask.parquet")
    rows = list(data.load_documents(path, "train", "rules"))
    contexts = [row["context"] for _, row in data.read_rows(path)]
    assert [row["text"] for row in rows] == contexts and len(rows) == 12
    for row in rows:
        assert len(row["entities"]) > 1000 and MASK in row["text"] and row["question"]
        assert all("\n" not in row["text"][a:b] and a < b for a, b in row["entities"])
    theirs = pyarrow.parquet.read_schema(path)
    ours = pyarrow.parquet.read_schema(exported(here, rows))
    assert ours.names == theirs.names
    for name in ours.names:
        field, own = theirs.field(name).type, ours.field(name).type
        if name == "extra_info":  # one more field says which document of ours it is
            assert [own.field(each.name).type for each in field] == [each.type for each in field]
        else:
            assert own == field


# --------------------------------------------------------------------------------- joined questions


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_joined_questions_stay_as_they_are_whatever_the_number_asked_for(
    objectives, ending, tmp_path
):
    path = write(tmp_path / f"train.{ending}", [pairs_row(number) for number in range(3)])
    rows = data.load_questions(path, objectives)
    assert [row["question"] for row in rows] == [
        pairs_row(n)["extra_info"]["question"] for n in range(3)
    ]
    assert all(row["answers"] == [["Ann", "Anna"], ["Rome"]] for row in rows)


def test_joined_questions_may_stand_in_the_prompt_alone(tmp_path):
    row = pairs_row(4) | {"extra_info": {"split": "train", "indices": [8, 9]}}
    [found] = data.load_questions(write(tmp_path / "train.parquet", [row]), 2)
    assert found["question"] == "Who is 4?; Where; or when, is 4?"


def test_single_questions_beside_joined_ones_are_joined_as_ever(tmp_path):
    singles = [{"question": f"Q{n}?", "answers": [f"a{n}"]} for n in range(5)]
    rows = data.load_questions(write(tmp_path / "train.jsonl", [pairs_row(), *singles]), 2)
    assert [row["question"] for row in rows[1:]] == ["Q0?; Q1?", "Q2?; Q3?"] and len(rows) == 3


@pytest.mark.parametrize("golds", [
    {"target": [["Ann", "Anna"], ["Rome"]]},
    [["Ann", "Anna"], ["Rome"]],
    "{'target': [['Ann', 'Anna'], ['Rome']]}",
    '{"target": [["Ann", "Anna", null], ["Rome"]]}',
    {"target": "[['Ann', 'Anna'], ['Rome']]"},
    {"target": np.array([np.array(["Ann", "Anna"], object), np.array(["Rome"], object)], object)},
    {"target": [["Ann", None, "", "Anna"], ["Rome", float("nan")]]},
    {"target": [[b"Ann", "Anna"], ["Rome"]]},
])  # fmt: skip
def test_golds_of_several_questions_are_read_however_they_are_written(golds):
    row = changed(pairs_row(), "reward_model.ground_truth", golds)
    row["prompt"] = np.array(row["prompt"], object)
    assert data.question_row("f:1", row, several=True)["answers"] == [["Ann", "Anna"], ["Rome"]]


@pytest.mark.parametrize("golds, words", [
    ({"target": [["Ann"], []]}, "no gold for question 2 of 2"),
    ({"target": [["Ann"], None]}, "no gold for question 2 of 2"),
    ({"target": [["Ann"], "Rome"]}, "golds must be texts"),
    ({"target": [["Ann"], [None]]}, "no gold for question 2 of 2"),
    ({"target": [["Ann"], [""]]}, "no gold for question 2 of 2"),
    ({"target": [["Ann"], [float("nan")]]}, "no gold for question 2 of 2"),
    ({"target": [["Ann"], [True]]}, "this is a bool"),
    ({"target": [["Ann"], [{"value": "Rome"}]]}, "this is a dict"),
    ({"target": [["Ann"]]}, "2 questions joined by ; but golds of 1"),
    ({"target": ["Ann", "Rome"]}, "2 questions joined by ; but golds of 1"),
    ({"target": [["a"], ["b"], ["c"], ["d"]]}, "2 questions joined by ; but golds of 4"),
    ({"target": []}, "no answer"),
    ({"target": None}, "no answer"),
    ({"gold": [["Ann"], ["Rome"]]}, "this is a dict"),
    (None, "no answer"),
    ("{'target': array(['Ann'])}", "can't be read"),
    ("['Ann' 'Rome']", "lost their commas"),
    (b"\xff", "not UTF-8"),
])  # fmt: skip
def test_golds_that_do_not_go_with_their_questions_are_named_in_one_line(golds, words, tmp_path):
    row = changed(pairs_row(), "reward_model.ground_truth", golds)
    with pytest.raises(DataError, match=f"f:7: .*{words}") as error:
        data.question_row("f:7", row, several=True)
    assert "\n" not in str(error.value)


def test_joined_questions_are_refused_where_one_is_answered(tmp_path):
    path = write(tmp_path / "train.parquet", [pairs_row()])
    with pytest.raises(DataError, match="row 1: golds of 2 questions at once; .*searchqa"):
        data.load_questions(path)
    with pytest.raises(DataError, match="row 1: golds of 2 questions at once"):
        list(data.masked_documents(path))


def test_too_few_questions_to_join_are_an_error(tmp_path):
    path = write(tmp_path / "q.jsonl", [{"question": "Who?", "answers": ["Ann"]}])
    with pytest.raises(DataError, match="1 questions, --objectives 2 needs more"):
        data.load_questions(path, 2)


def test_searchqa_trains_on_joined_questions_and_looks_at_others(model, here, signals):
    write(here / "train.parquet", [pairs_row(number) for number in range(4)])
    write(here / "dev.jsonl", [{"question": f"Q{n}?", "answers": ["a"]} for n in range(6)])
    write(here / "passages.jsonl", [{"id": "1", "title": "Rome", "text": "A city."}])
    flags = "--task searchqa --model model --data train.parquet --heldout dev.jsonl"
    flags += " --recipe released --objectives 3 --steps 1 --documents_per_step 2"
    flags += " --documents_per_update 2 --group 2 --answer_tokens 4 --result_tokens 4"
    train.main([*flags.split(), "--retriever", "passages.jsonl", "--out", "run"])
    first, last = train.read_metrics("run")
    assert first["heldout"]["questions"][3] == 2 and last["turns"] >= 1
    sample = json.loads(Path("run/samples.jsonl").read_text().splitlines()[0])
    assert sample["golds"] == [["Ann", "Anna"], ["Rome"]]


@real
def test_the_real_pairs_load_as_pairs():
    rows = data.load_questions(str(REAL / "released_shaped_pairs.parquet"), 3)
    assert len(rows) == 100 and all(len(row["answers"]) == 2 for row in rows)
    assert not any("Question:" in row["question"] for row in rows)


# ---------------------------------------------------------------------- LongBench, BABILong, others


def test_questions_of_longbench_and_babilong_are_read(tmp_path):
    longbench = {
        "input": "Who ran?", "context": "Ann ran. " * 9, "answers": ["Ann", "Anna"], "length": 18,
        "dataset": "hotpotqa", "language": "en", "all_classes": None, "_id": "b6a1",
    }  # fmt: skip
    babilong = {
        "input": "Mary went to the hall. " * 9,
        "question": "Where is Mary?",
        "target": "hall",
    }
    for ending in ("parquet", "jsonl"):
        [row] = data.load_questions(write(tmp_path / f"long.{ending}", [longbench]), long=True)
        assert (
            row["question"] == "Who ran?"
            and row["id"] == "b6a1"
            and row["context"] == longbench["context"]
        )
        assert row["answers"] == ["Ann", "Anna"]
        [row] = data.load_questions(write(tmp_path / f"babi.{ending}", [babilong]), long=True)
        assert row["question"] == "Where is Mary?" and row["answers"] == ["hall"]
        assert row["context"] == babilong["input"]


@pytest.mark.parametrize("context", [None, "", "  ", []])
def test_a_long_text_question_without_its_text_is_named(context, tmp_path):
    good = {"question": "Who?", "answers": ["Ann"], "context": "Ann ran."}
    path = write(tmp_path / "q.jsonl", [good, good | {"context": context}])
    assert len(data.load_questions(path)) == 2
    with pytest.raises(DataError, match="q.jsonl:2: a long-text question needs a context"):
        data.load_questions(path, long=True)


@pytest.mark.parametrize("answers, golds", [
    (["Ann", None], ["Ann"]), (np.array(["Ann", "Anna"], object), ["Ann", "Anna"]),
    (b"Ann", ["Ann"]), (1992.0, ["1992"]), (2.5, ["2.5"]),
    ({"target": "Ann"}, ["Ann"]), ({"target": ["Ann"]}, ["Ann"]),
    ({"target": [["Ann", "Anna"]]}, ["Ann", "Anna"]), ("{1, 2}", ["{1, 2}"]),
])  # fmt: skip
def test_golds_of_one_question_are_read_however_they_are_written(answers, golds):
    assert data.question_row("f:1", {"question": "Who?", "answers": answers})["answers"] == golds


GOOD = {"question": "Who?", "answers": ["Ann"]}


@pytest.mark.parametrize("row, words", [
    (GOOD | {"answers": float("nan")}, "no answer"),
    (GOOD | {"question": float("nan")}, "no question"),
    (GOOD | {"question": 5}, "no question"),
    (GOOD | {"answers": [True]}, "this is a bool"),
    (GOOD | {"answers": [["Ann"], "Bob"]}, "golds must be texts"),
    (GOOD | {"answers": {"text": ["Ann"]}}, "this is a dict"),
    (GOOD | {"context": 5}, "context must be"),
    (GOOD | {"context": ["ab"]}, "context must be"),
    (GOOD | {"context": [{"name": "a", "body": "b"}]}, "context must be"),
    (GOOD | {"context": [["a", None]]}, "context must be"),
    (GOOD | {"context": {"title": ["a", "b"], "sentences": [["c"]]}}, "context must be"),
])  # fmt: skip
def test_rows_of_wrong_types_are_named_in_one_line(row, words):
    with pytest.raises(DataError, match=f"f:3: .*{words}"):
        data.question_row("f:3", row)


def test_the_gold_that_the_reward_uses_wins_over_a_solution_beside_it():
    row = {
        "reward_model": {"ground_truth": "72"},
        "extra_info": {"question": "How many?", "answer": "48 + 24 = 72"},
    }
    assert data.question_row("f:1", row)["answers"] == ["72"]


# ------------------------------------------------------------------------------------------ recipes


def test_a_recipe_gives_the_settings_of_its_arm_and_explicit_flags_win(tmp_path):
    def configure(**given):
        return train.configure({"model": str(tmp_path), "data": ["x"], **given})

    paper, released = configure(), configure(recipe="released")
    assert (paper.chunk_tokens, paper.aggregate, paper.recall_window, paper.match) == (
        5120,
        "sequence",
        "after",
        "squad",
    )
    assert (released.chunk_tokens, released.aggregate, released.recall_window) == (
        5000,
        "token",
        "before",
    )
    assert (released.match, released.dual_clip, released.group, released.lr) == (
        "math",
        3.0,
        8,
        1e-6,
    )
    assert configure(recipe="released", chunk_tokens=64, match="squad").chunk_tokens == 64

    longqa = configure(task="longqa", recipe="released")
    alone = configure(task="longqa", recipe="released_alone")
    assert (longqa.group, longqa.lr, longqa.steps, longqa.documents_per_update) == (8, 1e-6, 500, 8)
    assert (alone.lr, alone.steps) == (5e-7, 1000) and configure(task="longqa").group == 16
    search = configure(task="searchqa", recipe="released")
    assert (search.documents_per_step, search.documents_per_update, search.scale) == (
        64,
        32,
        "group",
    )
    assert (search.result_tokens, search.match, search.lr) == (1000, "squad", 5e-7)
    with pytest.raises(
        distributed.InputError, match="released_alone has no settings for --task memtrain"
    ):
        configure(recipe="released_alone")


def test_the_models_own_settings_win_over_a_recipe(tmp_path):
    settings = {"settings": {"all": {"chunk_tokens": 60}}}
    (tmp_path / "memtrain.json").write_text(json.dumps(settings))
    cfg = train.configure({"model": str(tmp_path), "data": ["x"], "recipe": "released"})
    assert cfg.chunk_tokens == 60 and cfg.dual_clip == 3.0


def test_every_recipe_sets_flags_that_exist_to_what_they_may_be():
    for recipe in train.RECIPES.values():
        for task, settings in recipe.items():
            flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
            parser = train.argparse.ArgumentParser()
            train.add_flags(parser)
            given = vars(parser.parse_args(["--task", task, *flags]))
            assert {**settings, "task": task} == given


# --------------------------------------------------------------------------------------- the recall


def draws(tokenizer, chunks, window, count=8000, empty=()):
    """(k, l) of recalls of a document with one entity in every chunk but those in `empty`."""
    text, spans = "", []
    for chunk in range(chunks):
        name = "none" if chunk + 1 in empty else f"Ann{chunk}"
        spans += [[len(text), len(text) + len(name)]] if name != "none" else []
        text += name + " ran to the town and back again. "
    size = 40
    parts = [
        data.Chunk([], start, start + len(text) // chunks)
        for start in range(0, len(text), len(text) // chunks)
    ]
    document, rng = {"text": text, "answer": "Paris", "entities": spans}, random.Random(0)
    found = [
        data.draw_recall(document, parts[:chunks], tokenizer, size, rng, window)
        for _ in range(count)
    ]
    return [(recall.k, recall.l) for recall in found if recall]


@pytest.mark.parametrize("chunks, unread", [(5, 0.52), (8, 0.37), (2, 1.0)])
def test_before_reads_the_memory_before_a_turn_and_never_asks_for_the_first_section(
    tokenizer, chunks, unread
):
    found = draws(tokenizer, chunks, "before")
    steps = Counter(k for k, _ in found)
    assert set(steps) == set(range(1, chunks))
    assert all(abs(count / len(found) - 1 / (chunks - 1)) < 0.03 for count in steps.values())
    for k in range(1, chunks):
        sections = Counter(l for own, l in found if own == k)
        assert set(sections) == set(range(2, k + 2))
        assert max(sections.values()) < 1.7 * min(sections.values())
    assert abs(np.mean([l > k for k, l in found]) - unread) < 0.03


def test_after_asks_for_sections_that_were_read_before_turn_k(tokenizer):
    found = draws(tokenizer, 5, "after")
    assert set(found) == {(k, l) for k in range(2, 6) for l in range(1, k)}


@pytest.mark.parametrize("window, low", [("after", 1), ("before", 2)])
def test_a_section_without_entities_is_replaced_by_one_that_goes_with_the_step(
    tokenizer, window, low
):
    for empty in [{2, 3}, {2, 3, 4}, {2, 3, 4, 5}]:
        found = draws(tokenizer, 5, window, 300, empty)
        left = {l for l in range(low, 6) if l not in empty}
        assert {l for _, l in found} == left - ({5} if window == "after" else set())
        assert all(l < k <= 5 if window == "after" else 1 <= l - 1 <= k <= 4 for k, l in found)


@pytest.mark.parametrize("window", ["after", "before"])
def test_a_document_of_one_section_is_asked_for_that(tokenizer, window):
    assert set(draws(tokenizer, 1, window, 9)) == {(1, 1)}


# ----------------------------------------------------------------------------------------- matching


@pytest.mark.parametrize("answer, gold, squad, math", [
    ("Rome", "rome", 1, 1),
    ("the Nile", "Nile", 1, 0),
    ("U.S.", "US", 1, 0),
    ("New  York", "newyork", 0, 1),
    (r"\text{Rome}", "Rome", 0, 1),
    (r"50\%", "50", 1, 1),
    (r"$5$", "5", 1, 1),
    ("1/2", r"\dfrac12", 0, 1),
    ("x = 5", "5", 0, 1),
    (".5", "0.5", 0, 1),
    (r"12 \text{ miles}", "12", 0, 1),
    (r"\left( 3, 4 \right)", "(3,4)", 0, 1),
    ("", "the", 0, 0),
    ("$", "%", 0, 0),
    (None, "x", 0, 0),
])  # fmt: skip
def test_squad_and_math_take_different_answers_for_the_same(answer, gold, squad, math):
    assert rewards.answer_reward(answer, [gold]) == squad
    assert rewards.answer_reward(answer, ["other", gold], "math") == math


def test_math_looks_at_the_end_of_a_response_alone_and_what_is_reported_stays():
    agents = [SimpleNamespace(answer=r"\boxed{New York}" + filler) for filler in ("", 300 * ".")]
    group = train.scored(train.Config(match="math"), "trajectory", 0, agents, ["NewYork"])
    assert group.rewards == [1.0, 0.0] and group.exact_match == [0.0, 0.0]
    group = train.scored(train.Config(), "trajectory", 0, agents, ["New York"])
    assert group.rewards == group.exact_match == [1.0, 1.0]


# ----------------------------------------------------------------------------------------- building


def test_only_rare_and_short_entities_are_asked_for(tmp_path):
    rows = []
    for n in range(60):
        often = f"Of Oslo {n % 7} came Oslo, Oslo, Oslo and Oslo. "
        rows.append(
            {
                "title": f"life {n}",
                "text": often + f"In the north Ann Bell met Kim Dale {n}, who saw Rome.",
            }
        )
    with (tmp_path / "c.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    flags = f"build --corpus {tmp_path}/c.jsonl --documents 20 --heldout 0 --related 3 --random 4"
    flags += " --ner rules"
    sizes = ["--max_occurrences", "5", "--max_words", "3"]
    for name, more in {"any": [], "few": sizes}.items():
        assert not data.main([*flags.split(), "--out", str(tmp_path / name), *more])
    names = {}
    for name in ("any", "few"):
        names[name] = set()
        for document in data.load_documents(tmp_path / name, "train"):
            names[name] |= {document["text"][a:b] for a, b in document["entities"]} | {
                document["answer"]
            }
    assert "Oslo" in names["any"] and any(len(name.split()) == 3 for name in names["any"])
    assert "Oslo" not in names["few"] and {"Ann Bell", "Rome"} & names["few"]
    assert all(len(name.split()) < 3 for name in names["few"])


# --------------------------------------------------------------------------------------- evaluation


def test_the_released_arithmetic_takes_the_first_gold_and_leaves_empty_outputs_out(capsys, alone):
    rows = [{"answers": ["Rome", "Roma"]}] * 4 + [{"answers": ["Oslo"]}]
    outputs = [r"\boxed{Rome}", r"\boxed{Roma}", " ", None, r"\boxed{Bern}"]
    records = []
    for index, answer in enumerate(outputs):
        em = rewards.exact_match(rewards.extract_boxed(answer or ""), rows[index]["answers"])
        records.append({"index": index, "sample": 0, "id": "q", "answer": answer, "em": em})
    released = evaluation.released_em(rows, records)
    assert released == {"em": 1 / 3, "n": 3}
    evaluation.print_released({"a": evaluation.summary(records)}, {"a": released})
    shown = capsys.readouterr().out
    assert "a 33.33 of 3 outputs (em above: 40.00" in shown
    assert evaluation.released_em(rows[:1], [records[2] | {"index": 0}]) == {"em": None, "n": 0}


def test_eval_looks_at_documents_of_a_released_file_as_of_a_folder(
    pocket_model, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    documents = str(Path(pocket_model).parent / "documents")
    data.main(["export", documents, "--out", "documents.parquet", "--split", "heldout"])
    flags = ["--model", pocket_model, "--eval_documents", "8", "--ner", "rules"]
    evaluation.main(["memtrain", *flags, "--data", "documents.parquet"])
    assert "E2E" in capsys.readouterr().out


@pytest.mark.parametrize("extra", ["{'index': 1}", float("nan"), [1]])
def test_what_is_no_struct_in_a_masked_row_is_left_alone(extra, tmp_path):
    file = tmp_path / "rows.jsonl"
    row = {
        "question": "Who is [MASK] ?", "context": "[MASK] sat.",
        "answer": "Bob", "extra_info": extra,
    }  # fmt: skip
    file.write_text(json.dumps(row) + "\n")
    (document,) = data.masked_documents(str(file))
    assert document["text"] == "[MASK] sat." and document["answer"] == "Bob"


@pytest.mark.parametrize("golds", [
    "[array(['Ann'], dtype=object)]", "['Ann', nan]", "['O'Brien']", "array(['Ann'])",
    "{[1]: 'target'}",
])  # fmt: skip
def test_printed_golds_that_cannot_be_read_back_are_named_and_never_taken_for_a_text(
    golds, tmp_path
):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"question": "Who?", "answers": golds}) + "\n")
    with pytest.raises(data.DataError, match="rows.jsonl:1: golds that can't be read"):
        data.load_questions(str(file))


def test_the_folder_that_is_trained_on_is_looked_at_once(pocket_model):
    documents = str(Path(pocket_model).parent / "documents")
    once = train.load_heldout(train.Config(data=[documents]))
    assert train.load_heldout(train.Config(data=[documents], heldout=[documents])) == once
