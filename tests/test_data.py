"""data.py against plain code: masks, spans, documents, chunks, recalls, formats, search, errors."""

import collections
import doctest
import gzip
import http.server
import json
import os
import shutil
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import data
from data import MASK, TARGET, InputError

ROOT = Path(__file__).parent.parent
REAL = ROOT.parent / "shared" / "data"
WHY = "needs ../shared/data, real text that is not part of the project"
real = pytest.mark.skipif(not REAL.exists(), reason=WHY)
LETTERS = "abAé_\u0301 .,-"  # the accent that follows a letter is no word character to `re`


def write_jsonl(path, rows):
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


def world(articles=60, seed=0):
    """Articles about invented people who met in invented towns."""
    rng = random.Random(seed)
    endings = "grad", "wick", "ona", "by"
    towns = [a + b for a in ("Bel", "Mor", "Tar", "Ves", "Ulm") for b in endings]
    for number in range(articles):
        first = rng.choice(["Ada", "Ben", "Cy", "Dora"])
        last = rng.choice(["Stone", "Rivers", "Hill", "Marsh"])
        name = f"{first} {last}{chr(97 + number % 26)}"
        town, other, year = rng.choice(towns), rng.choice(towns), rng.randint(1700, 1999)
        text = f"In {year} the painter {name} came to {town} by ship. "
        text += f"Later she left {town} for {other}."
        yield {"id": str(number), "title": name, "text": text}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "world.jsonl.gz", world())


def run(*arguments):
    """The command line, in this process; the exit status is 2 after an error, None else."""
    return data.main([str(argument) for argument in arguments])


def build(corpus, out, documents, *more):
    sizes = ["--related", 4, "--random", 6, "--processes", 1]
    required = ["--corpus", corpus, "--out", out, "--documents", documents]
    assert not run("build", *required, "--ner", "rules", *sizes, *more)
    return [list(data.load_documents(out, split)) for split in ("train", "heldout")]


@pytest.fixture(scope="module")
def built(corpus, tmp_path_factory):
    return build(corpus, tmp_path_factory.mktemp("built") / "docs", 70)


def byte_level(pattern=None):
    """A BPE of 600 tokens, split by GPT-2's pattern or the given one."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core, bytewise = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    splits.append(bytewise(add_prefix_space=False, use_regex=not pattern))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Sequence(splits), decoders.ByteLevel()
    options = dict(initial_alphabet=bytewise.alphabet(), show_progress=False)
    trainer = trainers.BpeTrainer(vocab_size=600, **options)
    core.train_from_iterator([row["text"] for row in world()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level()


def test_the_examples_in_the_docstrings_hold():
    result = doctest.testmod(data)
    assert result.attempted > 8 and not result.failed


# ---- masks and spans -----------------------------------------------------------------------------


def slow_pattern(entity):
    return re.compile(rf"(?<![\w\u0300-\u036f]){re.escape(entity)}(?![\w\u0300-\u036f])")


@given(st.text(LETTERS, max_size=60), st.text(LETTERS, min_size=1, max_size=4))
def test_masking_equals_a_regular_expression_with_word_boundaries(text, entity):
    masked = data.mask(text, entity)[0]
    while text != (text := slow_pattern(entity).sub(MASK, text)):
        pass  # of "a.a." the second "a." hides the first, until it is masked
    assert masked == text


@given(st.text(LETTERS, max_size=60), st.text("ab", min_size=1, max_size=2), st.data())
def test_spans_keep_their_text_and_the_ones_that_are_hit_disappear(text, entity, draw):
    cuts = sorted(draw.draw(st.sets(st.integers(0, len(text)), max_size=12)))
    spans = [(a, b) for a, b in zip(cuts[::2], cuts[1::2])]
    masked, moved = data.mask(text, entity, spans)
    hits = [match.span() for match in slow_pattern(entity).finditer(text)]
    untouched = [(a, b) for a, b in spans if all(b <= start or end <= a for start, end in hits)]
    assert [masked[a:b] for a, b in moved] == [text[a:b] for a, b in untouched]


@pytest.mark.parametrize("text, entity, masked", [
    ("Mark marks Mark's Marks; Denmark, mark. (Mark)", "Mark",
     "# marks #'s Marks; Denmark, mark. (#)"),
    ("Émile, Zoë and Zoëlla", "Zoë", "Émile, # and Zoëlla"),
    ("Бах, Баха, «Бах»", "Бах", "#, Баха, «#»"),
    ("हिन्द हिन्दी", "हिन्द", "# हिन्दी"),
    ("12 of 120, 12% and 12th", "12", "# of 120, #% and 12th"),
    ("C++ and C+++", "C++", "# and #+"),
    ("New York in\nNew\nYork", "New York", "# in\n#"),
    ("a.b a+b", "a.b", "# a+b"),
    ("the the the", "the the", "# the"),
    ("_Mark_ Mark_1 Mark", "Mark", "_Mark_ Mark_1 #"),
    ("a+a+ b", "a+", "## b"),
    ("在北京的天安门，NBA北京站", "北京", "在#的天安门，NBA#站"),
    ("1920年12月，2月", "2月", "1920年12月，#"),
    ("1920年在Rome的Romeo", "Rome", "1920年在#的Romeo"),
    ("1920年 11920年", "1920", "#年 11920年"),
    ("東京都と東京タワー", "東京", "#都と#タワー"),
    ("サッカーをするサッカー選手", "サッカー", "#をする#選手"),
    ("ฉันไปกรุงเทพเมื่อวานที่กรุงเทพ", "กรุงเทพ", "ฉันไป#เมื่อวานที่#"),
    ("ទីក្រុងភ្នំពេញមាន", "ភ្នំពេញ", "ទីក្រុង#មាន"),
    ("서울에서 서울은 Rome에서", "서울", "#에서 #은 Rome에서"),
    ("서울에서 Rome에서", "Rome", "서울에서 #에서"),
    ("والقاهرة في القاهرة", "القاهرة", "و# في #"),
    ("בירושלים ירושלים", "ירושלים", "ב# #"),
    ("١٢ و١٢٠", "١٢", "# و١٢٠"),
])  # fmt: skip
def test_only_whole_words_are_masked_in_any_script(text, entity, masked):
    assert data.mask(text, entity, placeholder="#")[0] == masked


SCRIPTS = ["北京的。在", "とうカーキ々", "กรุเ่ำ", "ກຸ່າ", "ភ្នំេ", "မြ့န်", "བོད་ལ", "서울에은", "القاهرَ",
           "ירושָל", "abé\u0301", "हिन्द", "Бах", "aB1 +.\n_["]  # fmt: skip


@given(st.lists(st.text(st.sampled_from("".join(SCRIPTS)), max_size=12), max_size=4), st.data())
def test_of_no_script_is_an_occurrence_left_and_spans_keep_their_text(texts, draw):
    entity = draw.draw(st.text(draw.draw(st.sampled_from(SCRIPTS)), min_size=1, max_size=3))
    text = entity.join(texts)
    cuts = sorted(draw.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    spans = list(zip(cuts[::2], cuts[1::2]))
    masked, moved = data.mask(text, entity, spans)
    assert not data.occurrences(masked, entity) or data.occurrences(MASK, entity)
    kept = iter([text[a:b] for a, b in spans])
    assert all(masked[a:b] in kept for a, b in moved)  # in their order


@given(st.sampled_from(SCRIPTS[:10]), st.data())
def test_in_scripts_without_blanks_and_with_particles_no_character_of_the_answer_is_left(
    script, draw
):
    letters = [letter for letter in script if not letter.isascii()]
    text = draw.draw(st.text(letters, max_size=30))
    entity = draw.draw(st.text(letters, min_size=1, max_size=3))
    assert entity not in data.mask(text, entity)[0]


def test_one_name_in_two_unicode_spellings_is_one_name(tmp_path):
    row = {"title": "Beyonce\u0301", "text": "Beyonc\u00e9\u00a0Knowles and Beyonce\u0301  Knowles"}
    wanted = "Beyonc\u00e9\nBeyonc\u00e9 Knowles and Beyonc\u00e9 Knowles"
    assert data.read_corpus(write_jsonl(tmp_path / "c.jsonl", [row]))[0] == [wanted]


def test_unfair_answers_are_left_out():
    text = (
        "According to Ann, One of the 1,200 visitors met a man. Music is loud, music is long; "
        "The WHO and X agree. Rome fell in Rome."
    )
    names = "According,Ann,One,the,Music,WHO,X,Rome,MASK,[TARGET],7,twenty-one,a\nb,".split(",")
    names.insert(2, "1,200")
    assert [name for name in names if data.fair(name, text)] == ["Ann", "1,200", "WHO", "Rome"]


def test_words_in_small_letters_small_numbers_ranges_and_torn_quotations_are_no_answers():
    unfair = "several years later,Two men,High-profile,23,25 and 29 percent,1950s or 1960s,a—b"
    names = [*unfair.split(","), 'semilanceata"—Europe', "Life 8", "76th", "100", "5 km", "eBay"]
    assert [name for name in names if data.fair(name, ". ".join(names))] == names[-5:]


@pytest.mark.parametrize("name", ["თბილისი", "北京", "القاهرة"])
def test_names_in_scripts_without_capitals_are_fair(name):
    assert data.fair(name, f"{name}. {name}")


def test_of_two_names_one_of_which_holds_the_other_the_shorter_is_asked_for():
    text = "As Rossini, Gioachino Rossini met Alaskan poets of Alaska near New York in May 1822."
    (spans,) = data.find_entities([text], "rules")
    assert [text[a:b] for a, b in spans] == ["Rossini", "Alaska", "New York", "May 1822"]


def test_a_name_that_only_stands_within_another_word_takes_no_longer_one_away(monkeypatch):
    text = "In Port Anna, in Maryland."
    monkeypatch.setattr(data, "open_ner", lambda _: lambda texts: [[(3, 10), (3, 12), (17, 25)]])
    (spans,) = data._fair_entities([text], "any")
    assert [text[a:b] for a, b in spans] == ["Port Anna", "Maryland"]


@pytest.mark.parametrize("entity, name", [
    ("over 600", "600"), ("estimated 41.7%", "41.7%"), ("end of the 16th century", "16th century"),
    ("about US$5 million", "US$5 million"), ('"Bounty', "Bounty"), ('Prince",', "Prince"),
    ("the United States", "United States"), ("an Osprey's", "Osprey"), ("de Gaulle", "de Gaulle"),
])  # fmt: skip
def test_an_entity_loses_the_words_before_a_number_and_what_is_not_its_name(entity, name):
    start, end = data._trimmed(f"x {entity} y", 2, 2 + len(entity))
    assert f"x {entity} y"[start:end] == name


def test_the_rules_join_no_preposition_with_a_day_and_find_a_name_with_an_ampersand():
    (spans,) = data.find_entities(["On 15 November 2010 she left Light & Magic."], "rules")
    assert spans == [(3, 19), (29, 42)]


def test_the_rules_find_dates_numbers_names_and_works():
    text = (
        "The Hobbit\nThe writer J. R. R. Tolkien was born on 3 January 1892 in "
        'Bloemfontein. Although France paid $5 million, he sold 1,500 copies of "The Hobbit" in '
        "World War I. The Germans of the University of Leeds walked 12.5 km in the 19th century "
        "with Seán O'Brien of the U.S. army. Afterwards nothing happened to Rowling's Łódź."
    )
    (spans,) = data.find_entities([text], "rules")
    names = [text[a:b] for a, b in spans]
    for name in [
        "J. R. R. Tolkien", "3 January 1892", "Bloemfontein", "France", "$5 million", "1,500",
        "Hobbit", "World War I", "12.5 km", "19th century", "Seán O'Brien", "U.S.", "Rowling",
        "Łódź", "University of Leeds",
    ]:  # fmt: skip
        assert name in names or any(name in longer for longer in names), name
    assert not {"Although", "Afterwards", "The", "Although France", "Rowling's"} & set(names)


def ruler(folder, *names):
    """A spaCy pipeline that knows these names, saved."""
    import spacy

    nlp = spacy.blank("en")
    patterns = [{"label": "GPE", "pattern": name} for name in names]
    nlp.add_pipe("entity_ruler").add_patterns(patterns)
    nlp.to_disk(folder)
    return str(folder)


def test_a_trained_pipeline_is_loaded_by_name_and_its_entities_lose_articles_and_possessives(
    tmp_path,
):
    trained = ruler(tmp_path / "trained", "the United States", "Peru's", "three", "today")
    texts = ["She left the United States for Peru's coast in three days."] * 3000
    for spans in data.find_entities(texts, trained, processes=2):
        assert [texts[0][a:b] for a, b in spans] == ["United States", "Peru"]


def test_a_passage_beyond_the_pipelines_limit_is_tagged_piece_by_piece(tmp_path, monkeypatch):
    import spacy

    load = spacy.load

    def limited(*arguments, **options):
        nlp = load(*arguments, **options)
        nlp.max_length = 50
        return nlp

    monkeypatch.setattr(spacy, "load", limited)
    tag = data.open_ner.__wrapped__(ruler(tmp_path / "trained", "New Rome"))
    text = "so New Rome it is and then " * 9 + "x" * 120 + " New Rome"
    none, spans = tag(["", text])
    whole = [match.span() for match in re.finditer("New Rome", text)]
    assert set(spans) <= set(whole) and len(spans) > len(whole) / 2 and spans[-1] == whole[-1]
    assert none == []


@pytest.mark.parametrize("listens", [False, True])
def test_ner_keeps_tok2vec_where_it_listens_to_it_and_finds_the_same_either_way(
    listens, tmp_path, monkeypatch
):
    import spacy
    from spacy.training import Example

    nlp = spacy.blank("en")
    nlp.add_pipe("tok2vec")
    listener = {"@architectures": "spacy.Tok2VecListener.v1", "width": 96, "upstream": "*"}
    model = {"model": {"tok2vec": listener}} if listens else {}
    nlp.add_pipe("ner", config=model)
    texts = [row["text"] for row in world(20)]
    examples = []
    for text in texts:
        start = text.index("painter") + 8
        marks = {"entities": [(start, start + text[start:].index(" "), "PERSON")]}
        examples.append(Example.from_dict(nlp.make_doc(text), marks))
    nlp.initialize(lambda: examples)
    for _ in range(30):
        nlp.update(examples)
    nlp.to_disk(tmp_path / "trained")
    loaded, load = [], spacy.load
    monkeypatch.setattr(spacy, "load", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[0])
    found = data.open_ner.__wrapped__(str(tmp_path / "trained"))(texts)
    assert loaded[0].pipe_names == (["tok2vec", "ner"] if listens else ["ner"])
    expected = [[(e.start_char, e.end_char) for e in nlp(text).ents] for text in texts]
    assert list(found) == expected and any(expected)


# ---- documents -----------------------------------------------------------------------------------


def test_documents_hold_the_promised_passages_and_the_answer_nowhere(corpus, built):
    known = set(data.read_corpus(corpus)[0])
    for document in built[0] + built[1]:
        restored = document["text"].replace(MASK, document["answer"]).split("\n\n")
        assert len(set(restored)) == 11 and set(restored) <= known
        assert MASK in document["text"] and document["question"] is None
        assert not slow_pattern(document["answer"]).search(document["text"])


def test_entity_spans_point_at_the_same_names_that_the_passages_have(corpus, built):
    texts, _ = data.read_corpus(corpus)
    names = {}
    for text, spans in zip(texts, data.find_entities(texts, "rules")):
        names[text] = [text[a:b] for a, b in spans]
    for document in built[0]:
        answer = document["answer"]
        restored = document["text"].replace(MASK, answer).split("\n\n")
        wanted = [name for passage in restored for name in names[passage]]
        wanted = [name for name in wanted if not slow_pattern(answer).search(name)]
        assert [document["text"][a:b] for a, b in document["entities"]] == wanted
        assert document["entities"] == sorted(document["entities"])


def test_a_document_depends_on_seed_and_number_not_on_how_many_are_built(corpus, built, tmp_path):
    few, few_heldout = build(corpus, tmp_path / "few", 3, "--heldout", 2)
    assert few == built[0][:3] and few_heldout == built[1][:2]
    other, _ = build(corpus, tmp_path / "other", 3, "--seed", 1)
    assert all(a["text"] != b["text"] for a, b in zip(few, other))


LETTERS_OF = [a + b for a in "bcdfg" for b in "aeiou"]  # of 25 articles


@pytest.fixture(scope="module")
def telling(tmp_path_factory):
    """Documents whose answer tells its article and its passage: no name stands in two passages."""
    rows = []
    for article in LETTERS_OF:
        for passage in "klmnprst":
            one, other = f"Z{article}{passage}a", f"Z{article}{passage}o"
            text = f"once upon a time the painter {one} came with a friend called {other} to town."
            rows.append({"title": f"about {article}", "text": text})
    folder = tmp_path_factory.mktemp("telling")
    return build(write_jsonl(folder / "c.jsonl", rows), folder / "docs", 400, "--heldout", 100)


def test_no_article_gives_pivots_to_both_sides(telling):
    train, heldout = [{document["answer"][1:3] for document in part} for part in telling]
    assert heldout and not train & heldout and train | heldout == set(LETTERS_OF)


def test_pieces_of_an_article_without_a_title_stand_on_one_side(tmp_path):
    for number in range(30):
        text = " ".join(f"Ann{number} met Bob in {year}." for year in range(1800, 1840))
        (tmp_path / f"{number}.txt").write_text(text)
    texts, articles = data.read_corpus(str(tmp_path), words=10)
    pivots = data.split_pivots(articles, 0)
    sides = [{texts[row].split()[0] for row in rows} for rows in pivots.values()]
    assert len(texts) > 30 and len(set(articles)) == 30
    assert all(sides) and not sides[0] & sides[1]


CHINESE = "{0}位于上河镇以南，由陈军建于18{1}年。{2}出生在{0}，后来搬到古沙镇。"


def test_documents_of_a_script_without_blanks_are_cut_masked_and_searched(tmp_path, capsys):
    towns = [f"{a}{b}镇" for a in "东西南北中上下" for b in "山河湖桥门林"]
    names = [f"{a}{b}" for a in "王李张刘陈杨黄" for b in "敏强芳军华平"]
    rows = []
    for number, (town, name) in enumerate(zip(towns, names)):
        rows.append({"title": town, "text": ""})
        for year in range(10, 15):
            rows[-1]["text"] += CHINESE.format(town, year, name)
    texts, articles = data.read_corpus(write_jsonl(tmp_path / "c.jsonl", rows), words=30)
    assert len(texts) == 42 * 3 and max(map(data.word_count, texts)) < 60
    entities = []
    for text in texts:
        spans = [match.span() for name in towns + names for match in re.finditer(name, text)]
        entities.append(sorted(spans))
    hits = data.open_index(texts)([f"谁出生在{towns[3]}"], 2)
    assert {articles[row] for row, _ in hits[0]} == {towns[3]}
    corpus = data.Corpus(texts, entities, lambda row: [])
    args = SimpleNamespace(related=0, random=20)
    for pivot in range(20):
        document = data.assemble(corpus, pivot, args, random.Random(pivot))
        assert document["answer"] not in document["text"] and MASK in document["text"]


def test_build_counts_answers_that_still_stand_inside_other_words(tmp_path, capsys):
    rows = [f"the man met Zed{number} at noon; Zed{number}son left." for number in range(40)]
    path = write_jsonl(tmp_path / "c.jsonl", [{"text": text} for text in rows])
    documents, _ = build(path, tmp_path / "docs", 20, "--heldout", 0)
    inside = sum(document["answer"] in document["text"] for document in documents)
    assert inside and f"{inside} of the answers still stand inside" in capsys.readouterr().out


def test_the_pivot_lies_anywhere_in_its_document_equally_often(telling):
    found = collections.Counter()
    for document in telling[0] + telling[1]:
        passages = document["text"].split("\n\n")
        (number,) = [number for number, passage in enumerate(passages) if MASK in passage]
        found[number] += 1
    expected = 500 / 11
    assert all(abs(found[number] - expected) < 4 * expected**0.5 for number in range(11)), found


def test_a_document_holds_the_passages_that_share_the_pivots_rare_words(tmp_path):
    rows = []
    for i in range(60):  # two passages of every rare word
        name = f"{chr(65 + i % 26)}elt{chr(97 + i % 20)}"
        rows.append({"text": f"they say that the man {name} saw a whatsit{i % 30}."})
    path = write_jsonl(tmp_path / "c.jsonl", rows)
    for document in build(path, tmp_path / "docs", 20, "--related", 1)[0]:
        passages = document["text"].split("\n\n")
        (pivot, *_) = [passage for passage in passages if MASK in passage]
        assert sum(pivot.split()[-1] in passage for passage in passages) == 2


def test_pivots_without_an_entity_are_replaced(tmp_path):
    dull = [{"text": f"nothing to see here {word}."} for word in ("again", "ever", "soon", "now")]
    path = write_jsonl(tmp_path / "c.jsonl", [*world(20), *dull * 9])
    assert len(build(path, tmp_path / "docs", 20)[0]) == 20


def test_a_word_of_one_character_is_found_in_a_script_whose_words_are_pairs():
    search = data.open_index(["책 of paper", "물 and ice", "얼음 of ice"])
    assert [[row for row, _ in hits] for hits in search(["물", "얼음"], 3)] == [[1], [2]]


def test_search_puts_shared_rare_words_first_and_leaves_out_what_shares_none():
    texts = [f"filler {word} words" for word in "red green blue black white".split()]
    texts += ["zebra stripes filler", "zebra hooves filler"]
    (hits,) = data.open_index(texts)([texts[5]], 3)
    assert [row for row, _ in hits][:2] == [5, 6]
    (hits,) = data.open_index(["zebra", "lion", "bear"])(["zebra"], 3)
    assert [row for row, _ in hits] == [0]


RAN = {"id": "a", "text": "Ann ran.", "answer": "Bob", "entities": [[0, 3]]}


def test_a_document_may_bring_its_question_and_parts_may_come_from_iterators(tmp_path, capsys):
    docs, own = tmp_path / "docs", RAN | {"question": "Who walked?"}
    data.save_documents(docs, {"train": iter([own, RAN]), "heldout": iter([])})
    assert list(data.load_documents(docs, "train")) == [own, RAN | {"question": None}]
    assert len(data.load_documents(docs, "heldout")) == 0
    assert not run("show", docs) and "Who walked?" in capsys.readouterr().out
    assert not run("show", docs, "--document", 1) and "question" not in capsys.readouterr().out


def test_folders_of_before_there_were_questions_can_be_read(tmp_path):
    import datasets

    parts = datasets.DatasetDict({"train": datasets.Dataset.from_list([RAN])})
    parts.save_to_disk(tmp_path / "docs")
    assert list(data.load_documents(tmp_path / "docs", "train")) == [RAN]
    assert not run("show", tmp_path / "docs")


def test_documents_that_break_off_leave_nothing_and_a_folder_that_is_there_is_not_touched(tmp_path):
    def broken():
        yield RAN
        raise RuntimeError

    with pytest.raises(RuntimeError):
        data.save_documents(tmp_path / "docs", {"train": broken()})
    assert not list(tmp_path.iterdir())
    (tmp_path / "docs").mkdir()
    with pytest.raises(InputError, match="is there already"):
        data.save_documents(tmp_path / "docs", {"train": []})


def test_passages_with_a_placeholder_and_doubles_are_dropped(tmp_path):
    rows = [{"text": text} for text in ("good", f"bad {MASK}", f"bad {TARGET}", "good", "", "fine")]
    assert data.read_corpus(write_jsonl(tmp_path / "c.jsonl", rows))[0] == ["good", "fine"]


SAID = ["Tom ran.", "It fell on him at noon.", "Dr. Who met J. Smith!", "line\n", "so it goes"]


@given(st.lists(st.sampled_from(SAID), max_size=60), st.integers(3, 20))
def test_cutting_keeps_every_word_in_order_and_the_size_near_the_wanted(sentences, words):
    text = data.tidy(" ".join(sentences))
    pieces = data.split_article(text, words)
    assert " ".join(pieces).split() == text.split()
    if len(text.split()) <= 2 * words:
        assert pieces == [text]
    else:
        assert all(words / 2 - 10 <= len(piece.split()) for piece in pieces)


def test_articles_are_cut_at_sentence_ends_and_passages_are_not():
    numbered = "Sentence {} by Dr. Who has exactly nine words here."
    article = " ".join(numbered.format(number) for number in range(100))
    pieces = data.split_article(article, 160)
    assert all(piece.endswith("here.") and 140 <= len(piece.split()) <= 240 for piece in pieces)
    assert data.split_article(article[:1000], 160) == [article[:1000]]


# ---- chunks and recalls --------------------------------------------------------------------------


QWEN2 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.mark.parametrize("pattern", [None, QWEN2])
@pytest.mark.parametrize("size", [1, 7, 64, 100_000])
def test_chunks_are_the_tokens_of_one_call_and_the_characters_of_the_text(size, pattern):
    rows = enumerate(world(40))
    text = "\n".join(row["text"] + " Ω😀é\u0301 " * (number % 3) for number, row in rows)
    tokenizer = byte_level(pattern)
    found, ids = data.chunks(text, tokenizer, size), tokenizer(text)["input_ids"]
    assert [i for chunk in found for i in chunk.ids] == ids
    assert all(len(chunk.ids) == size for chunk in found[:-1]) and 0 < len(found[-1].ids) <= size
    assert "".join(text[chunk.start : chunk.end] for chunk in found) == text


def test_offsets_name_the_characters_of_the_ids(tokenizer):
    text = "\n".join(row["text"] for row in world(10))
    for chunk in data.chunks(text, tokenizer, 16):
        assert tokenizer.decode(chunk.ids) == text[chunk.start : chunk.end]
    assert data.chunks("", tokenizer, 5) == [data.Chunk([], 0, 0)]


def test_recall_targets_lie_in_their_chunk_and_fit_its_size(built, tokenizer):
    rng = random.Random(0)
    for document in built[0]:
        parts = data.chunks(document["text"], tokenizer, 60)
        recall = data.draw_recall(document, parts, tokenizer, 60, rng)
        _, start, end = parts[recall.l - 1]
        assert 1 <= recall.l < recall.k <= len(parts) and len(recall.ids) <= 60
        inside = [(a, b) for a, b in document["entities"] if start <= a and b <= end]
        assert recall.target in [document["text"][a:b] for a, b in inside]
        assert recall.target != document["answer"]
        shown = tokenizer.decode(recall.ids)
        assert TARGET in shown and not slow_pattern(recall.target).search(shown)


@pytest.mark.parametrize("hidden", [2, 27])
def test_a_recall_that_outgrew_its_chunk_loses_the_end_farther_from_the_target(hidden, tokenizer):
    text = " ".join(f"word{number:02d}" for number in range(30))
    name = f"word{hidden:02d}"
    start = text.index(name)
    document = {"text": text, "answer": "-", "entities": [[start, start + len(name)]]}
    size = len(tokenizer(text)["input_ids"])
    whole = tokenizer(text.replace(name, TARGET))["input_ids"]
    assert len(whole) > size
    parts = data.chunks(text, tokenizer, size)
    recall = data.draw_recall(document, parts, tokenizer, size, random.Random(0))
    assert (recall.k, recall.l) == (1, 1)
    assert recall.ids == (whole[:size] if hidden == 2 else whole[-size:])


def encode(text, **options):
    return {"input_ids": [0]}


def test_k_l_and_the_target_are_uniform():
    # two names in each of four chunks
    spans = [[2 * i, 2 * i + 1] for i in range(8)]
    document = {"text": "a b c d e f g h", "answer": "-", "entities": spans}
    parts = [data.Chunk([0, 0], 4 * i, 4 * i + 3) for i in range(4)]
    rng, counts = random.Random(0), collections.Counter()
    for _ in range(6000):
        recall = data.draw_recall(document, parts, encode, 2, rng)
        counts[recall.k, recall.l, recall.target] += 1
    for (k, l, _), count in counts.items():
        expected = 6000 / 3 / (k - 1) / 2
        assert abs(count - expected) < 5 * expected**0.5, (k, l, count, expected)
    drawn = {(k, l) for k, l, _ in counts}
    assert drawn == {(k, l) for k in range(2, 5) for l in range(1, k)} and len(counts) == 12


def test_chunks_without_an_entity_are_passed_over():
    def draw(answer, spans, seed=0, count=5):
        document = {"text": "abcde", "answer": answer, "entities": spans}
        parts = [data.Chunk([0], i, i + 1) for i in range(count)]
        return data.draw_recall(document, parts, encode, 1, random.Random(seed))

    recalls = [draw("a", [[0, 1], [3, 4]], seed) for seed in range(50)]
    assert {(recall.k, recall.l, recall.target) for recall in recalls} == {(5, 4, "d")}
    assert draw("-", [[4, 5]]) is None  # no later memory is left to recall the last from
    assert draw("-", [[1, 3]]) is None  # lies in no chunk wholly
    assert draw("-", [], count=1) is None


@pytest.mark.parametrize("empty", [{2, 3}, {2, 3, 4}, {2, 3, 4, 5}])
def test_a_section_without_entities_is_replaced_by_one_that_goes_with_the_step(empty):
    text, spans, parts = "", [], []
    for number in range(1, 6):
        start, text = len(text), f"{text}Ann{number} ran. "
        parts.append(data.Chunk([], start, len(text)))
        if number not in empty:
            spans.append([start, start + 4])
    document, rng = {"text": text, "answer": "Paris", "entities": spans}, random.Random(0)
    recalls = [data.draw_recall(document, parts, encode, 40, rng) for _ in range(300)]
    assert {recall.l for recall in recalls} == {l for l in range(1, 5) if l not in empty}
    assert all(recall.l < recall.k <= 5 for recall in recalls)


def test_show_prints_chunks_masks_and_the_answer(corpus, tmp_path, tokenizer, capsys):
    docs, words = tmp_path / "docs", tmp_path / "tokenizer"
    (document,), _ = build(corpus, docs, 1, "--heldout", 0)
    tokenizer.save_pretrained(words)
    capsys.readouterr()
    assert not run("show", docs, "--tokenizer", words, "--chunk_tokens", 100)
    printed = capsys.readouterr().out
    for part in f"is {document['answer']!r}", "chunk 2 of", "100 tokens", TARGET:
        assert part in printed
    assert printed.count(MASK) == document["text"].count(MASK) + 1
    assert not run("show", docs) and document["text"] in capsys.readouterr().out
    assert run("show", docs, "--document", 1) == 2
    assert "train has 1 documents" in capsys.readouterr().err


# ---- file formats --------------------------------------------------------------------------------

PASSAGES = [
    {"id": "1", "title": "Rome", "text": "A city in Italy."},
    {"id": "2", "title": "Nile", "text": "A river in Egypt."},
]


def write_rows(path, rows):
    """The rows as a file of the kind that its name says."""
    from pyarrow import Table, parquet

    if path.suffix == ".parquet":
        parquet.write_table(Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        write_jsonl(path, rows)
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "parquet", "wiki-18", "folder"])
def test_a_corpus_may_come_in_any_form(kind, tmp_path):
    rows = PASSAGES
    if kind == "wiki-18":
        rows = [{"id": r["id"], "contents": f'"{r["title"]}"\n{r["text"]}'} for r in PASSAGES]
    ending = "jsonl" if kind in ("wiki-18", "folder") else kind
    path = write_rows(tmp_path / f"c.{ending}", rows)
    path = str(tmp_path) if kind == "folder" else path
    assert [data.passage(*row) for row in data.read_rows(path)] == PASSAGES
    texts = ["Rome\nA city in Italy.", "Nile\nA river in Egypt."]
    assert data.read_corpus(path, limit=5)[0] == texts


def test_a_folder_is_its_files_each_read_as_by_itself_and_says_so(tmp_path, capsys):
    (tmp_path / "more").mkdir()
    (tmp_path / ".hidden.jsonl").write_text("{")
    (tmp_path / "README.md").write_text("about")
    write_jsonl(tmp_path / "a.jsonl", [{"id": "1", "text": "Ann ran.", "meta": None}])
    (tmp_path / "b.txt").write_text("Bob\nsat.\n\nCy left.")
    row = {"contents": '"Rome"\nA city.', "meta": {"k": 1}}
    write_jsonl(tmp_path / "more" / "a.jsonl.gz", [row])
    write_rows(tmp_path / "more" / "b.parquet", [{"id": 5, "title": 1984, "text": "A novel."}])
    rows = list(data.read_rows(str(tmp_path)))
    files = [tmp_path / name for name in ("a.jsonl", "b.txt", "more/a.jsonl.gz", "more/b.parquet")]
    assert rows == [row for file in files for row in data.read_rows(str(file))]
    said = capsys.readouterr().err
    assert "reads 4 files; leaves out .hidden.jsonl, README.md\n" in said
    assert data.read_corpus(str(tmp_path)) == (
        ["Ann ran.", "Bob sat.\nCy left.", "Rome\nA city.", "1984\nA novel."],
        ["1", "2", "Rome", "1984"],
    )
    (tmp_path / "more" / "c.csv").write_text("x")
    with pytest.raises(InputError, match="more/c.csv: unknown kind of file"):
        list(data.read_rows(str(tmp_path)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: no data in this folder"):
        list(data.read_rows(str(tmp_path / "empty")))


def test_a_passages_title_is_its_first_line_where_it_has_two():
    wanted = {"id": "f:1", "title": "", "text": "Just a text."}
    assert data.passage("f:1", {"contents": "Just a text."}) == wanted
    assert data.passage("f:1", {"id": 10**400, "text": "x"})["id"] == str(10**400)
    row = {"id": float("nan"), "title": float("nan"), "text": "half \ud800"}
    assert data.passage("f:1", row) == {"id": "f:1", "title": "", "text": "half \ufffd"}
    for row in {"title": ["a"]}, {"id": {}}, {"id": [True]}:
        with pytest.raises(InputError, match="f:1: (title|id): must be a text"):
            data.passage("f:1", {"text": "x", **row})


def test_plain_text_loses_its_hard_line_breaks_and_keeps_its_paragraphs(tmp_path):
    (tmp_path / "c.txt").write_text("He saw New\nYork.\n\nThen\nhe left.\n")
    assert data.read_corpus(str(tmp_path / "c.txt"))[0] == ["He saw New York.\nThen he left."]
    (tmp_path / "long.txt").write_text("One word more here.\n\n" * 3000)
    ((_, row),) = data.read_rows(str(tmp_path / "long.txt"))
    assert len(row["text"].split()) == 12000


def test_hub_names_go_to_the_right_loader(monkeypatch, tmp_path):
    import datasets
    import huggingface_hub

    path = write_rows(tmp_path / "q.parquet", [{"question": "Who?", "answers": ["Ann"]}])
    rows, asked = datasets.Dataset.from_list(PASSAGES), []
    load = lambda *a, **k: asked.append((a, k)) or rows  # noqa: E731
    download = lambda *a, **k: asked.append((a, k)) or path  # noqa: E731
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert len(list(data.read_rows("wikimedia/wikipedia:20231101.en"))) == 2
    assert len(list(data.read_rows("RUC-NLPIR/FlashRAG_datasets:nq:dev"))) == 2
    assert data.load_questions("BytedTsinghua-SIA/hotpotqa")[0]["answers"] == ["Ann"]
    memagent = "BytedTsinghua-SIA/hotpotqa", "hotpotqa_train_32k.parquet"
    assert asked == [
        (("wikimedia/wikipedia", "20231101.en"), {"split": "train", "streaming": False}),
        (("RUC-NLPIR/FlashRAG_datasets", "nq"), {"split": "dev", "streaming": False}),
        (memagent, {"repo_type": "dataset"}),
    ]


MEMAGENT = {
    "data_source": "hotpotqa", "prompt": [{"role": "user", "content": "Who?"}],
    "context": "Document 1:\nA\nb", "ability": "memory",
    "reward_model": {"style": "rule", "ground_truth": ["Ann", "Anna"]},
    "extra_info": {"index": 4, "question": "Who?", "num_docs": 1},
    "scores": [{"model": {"em": [0.5]}}],
}  # fmt: skip
CONTEXT = {"context": MEMAGENT["context"]}
GOOD = {"question": "Who?", "answers": ["Ann"]}
PLAIN = {"id": "4", "question": "Who?", "answers": ["Ann", "Anna"]}
IN_THE_EVALUATION = {"input": "Who?", "answers": ["Ann", "Anna"], "index": 4} | CONTEXT


@pytest.mark.parametrize("kind, row", [
    ("parquet", MEMAGENT),
    ("jsonl", {**MEMAGENT, "extra_info": {"index": 4}}),  # the question stands in the prompt alone
    ("json", IN_THE_EVALUATION),
    ("json", {**IN_THE_EVALUATION, "answers": '["Ann", "Anna"]', "index": "4"}),
    ("jsonl.gz", {**PLAIN, "context": [["A", "b"]]}),
    ("jsonl", {**PLAIN, "context": [["A", ["b"]]]}),
    ("jsonl", {**PLAIN, "context": {"title": ["A"], "sentences": [["b"]]}}),
    ("parquet", {"id": "4", "question": "Who?", "golden_answers": ["Ann", "Anna"]}),
    ("jsonl", {"id": "4", "question": "Who? ", "golden_answers": ["Ann", "Anna"], "metadata": {}}),
])  # fmt: skip
def test_questions_may_come_in_any_form(kind, row, tmp_path):
    (found,) = data.load_questions(write_rows(tmp_path / f"q.{kind}", [row]))
    wanted = PLAIN | {"source": row.get("data_source", ""), "context": ""}
    assert found == wanted | (CONTEXT if "context" in row else {})


@pytest.mark.parametrize("count", [1, 2, 3])
def test_questions_are_paired_within_their_source_in_order(count):
    names = [f"{source}{n}" for n in range(7) for source in "ab"]
    rows = [{"id": n, "source": n[0], "question": f"{n}?", "answers": [n]} for n in names]
    joined = data.pair_questions(rows, count)
    assert len(joined) == 2 * (7 // count)
    for number, row in enumerate(joined[: 7 // count]):
        members = [f"a{n}" for n in range(number * count, (number + 1) * count)]
        assert row["question"] == "; ".join(f"{name}?" for name in members)
        assert row["answers"] == [[name] for name in members]


# ---- questions as other code bases have them ----------------------------------------------------


def pairs_row(number=0):
    """A row in the columns of the released search training file."""
    joined = f"Who is {number}?; Where; or when, is {number}?"
    prompt = f"Search; then answer.\n\nAnswer these questions: {joined}\n"
    return {
        "data_source": "nq_hotpotqa",
        "prompt": [{"content": prompt, "role": "user"}],
        "ability": "fact-reasoning",
        "reward_model": {"style": "rule", "ground_truth": {"target": [["Ann", "Anna"], ["Rome"]]}},
        "extra_info": {"index": number, "split": "train", "question": joined},
    }


def with_golds(golds):
    return pairs_row() | {"reward_model": {"ground_truth": golds}}


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_joined_questions_stay_as_they_are_whatever_the_number_asked_for(
    objectives, ending, tmp_path
):
    pairs = [pairs_row(number) for number in range(3)]
    rows = data.load_questions(write_rows(tmp_path / f"train.{ending}", pairs), objectives)
    asked = [row["extra_info"]["question"] for row in pairs]
    assert [row["question"] for row in rows] == asked
    assert all(row["answers"] == [["Ann", "Anna"], ["Rome"]] for row in rows)


def test_single_questions_beside_joined_ones_are_joined_as_ever(tmp_path):
    singles = [{"question": f"Q{n}?", "answers": [f"a{n}"]} for n in range(5)]
    rows = data.load_questions(write_rows(tmp_path / "train.jsonl", [pairs_row(), *singles]), 2)
    assert [row["question"] for row in rows[1:]] == ["Q0?; Q1?", "Q2?; Q3?"] and len(rows) == 3


@pytest.mark.parametrize("golds", [
    {"target": [["Ann", "Anna"], ["Rome"]]},
    [["Ann", "Anna"], ["Rome"]],
    '{"target": [["Ann", "Anna", null], ["Rome"]]}',
    {"target": '[["Ann", "Anna"], ["Rome"]]'},
    {"target": [["Ann", None, "", "Anna"], ["Rome", float("nan")]]},
    {"target": [[b"Ann", "Anna"], ["Rome"]]},
])  # fmt: skip
def test_golds_of_several_questions_are_read_however_they_are_written(golds):
    found = data.question_row("f:1", with_golds(golds), several=True)
    assert found["answers"] == [["Ann", "Anna"], ["Rome"]]


BESIDE_ANN = [[], None, [None], [""], [float("nan")]]  # the golds of the second question
WRONG_GOLDS = {
    "no gold for question 2 of 2": [{"target": [["Ann"], golds]} for golds in BESIDE_ANN],
    "golds must be texts": [{"target": [["Ann"], "Rome"]}],
    "this is a bool": [{"target": [["Ann"], [True]]}],
    "this is a dict": [{"target": [["Ann"], [{"value": "Rome"}]]}, {"gold": [["Ann"], ["Rome"]]}],
    "2 questions joined by ; but golds of 1": [{"target": [["Ann"]]}, {"target": ["Ann", "Rome"]}],
    "2 questions joined by ; but golds of 4": [{"target": [["a"], ["b"], ["c"], ["d"]]}],
    "no answer": [None, {"target": []}, {"target": None}],
    "not UTF-8": [b"\xff"],
}


@pytest.mark.parametrize("words", WRONG_GOLDS)
def test_golds_that_do_not_go_with_their_questions_are_named_in_one_line(words):
    for golds in WRONG_GOLDS[words]:
        with pytest.raises(InputError, match=f"f:7: .*{words}") as error:
            data.question_row("f:7", with_golds(golds), several=True)
        assert "\n" not in str(error.value)


@real
def test_the_real_pairs_load_as_pairs():
    rows = data.load_questions(str(REAL / "released_shaped_pairs.parquet"), 3)
    assert len(rows) == 100 and all(len(row["answers"]) == 2 for row in rows)
    assert not any("Question:" in row["question"] for row in rows)


@pytest.mark.parametrize("context", [None, "", "  ", []])
def test_a_long_text_question_without_its_text_is_named(context, tmp_path):
    rows = [GOOD | {"context": "Ann ran."}, GOOD | {"context": context}]
    path = write_rows(tmp_path / "q.jsonl", rows)
    assert len(data.load_questions(path)) == 2
    with pytest.raises(InputError, match="q.jsonl:2: a long-text .* a context or paragraphs"):
        data.load_questions(path, long=True)


@pytest.mark.parametrize("answers, golds", [
    (["Ann", None], ["Ann"]), (["Ann", "Anna"], ["Ann", "Anna"]), ("x", ["x"]), (b"Ann", ["Ann"]),
    ('["x", "y\'s"]', ["x", "y's"]), ("[sic]", ["[sic]"]), ("{1, 2}", ["{1, 2}"]),
    (["['x']"], ["['x']"]), (1992, ["1992"]), (1992.0, ["1992"]), (2.5, ["2.5"]),
    ({"target": "Ann"}, ["Ann"]), ({"target": ["Ann"]}, ["Ann"]),
    ({"target": [["Ann", "Anna"]]}, ["Ann", "Anna"]),
    ({"value": "Ann", "aliases": ["Anna"], "type": "WikipediaEntity"}, ["Ann", "Anna"]),
])  # fmt: skip
def test_golds_of_one_question_are_read_however_they_are_written(answers, golds):
    assert data.question_row("f:1", {"question": "Who?", "answers": answers})["answers"] == golds


def said_by(role, content):
    return {"question": None, "prompt": [{"role": role, "content": content}]}


WRONG = {  # {words of the error: fields of a row that is good otherwise}
    "no answer": [{"answers": float("nan")}],
    "no question": [{"question": float("nan")}],
    "question: neither a text nor": [{"question": 5}, {"question": ["Who?"]}],
    "prompt: neither": [said_by("assistant", "Who?"), said_by("user", [{"text": "Who?"}])],
    "question and input disagree": [{"input": "Mary went to the hall."}],
    "question and extra_info.question disagree": [{"extra_info": {"question": "When?"}}],
    "answers and answer disagree": [{"answer": "Bob"}],
    "context and paragraphs": [{"context": "Ann ran.", "paragraphs": [["A", "Bob ran."]]}],
    "choice_A: questions with choices": [{"choice_A": "Ann"}],
    "choices: questions with choices": [{"choices": {"label": ["A"], "text": ["Ann"]}}],
    "options: questions with choices": [{"options": ["Ann", "Bob"]}],
    "all_classes: questions with choices": [{"all_classes": ["Ann", "Bob"]}],
    "outputs: .* lists to be named": [{"answers": None, "outputs": ["Ann", "Bob"]}],
    "id: must be a text": [{"id": {"a": 1}}],
    "golds of 2 questions at once": [pairs_row()],
    "of one question alone": [{"answers": [["a"], ["b"]], "answer_aliases": ["c"]}],
    "golds must be texts": [{"answers": [["Ann"], "Bob"]}],
    "this is a float": [{"answers": [float("inf")]}],
    "this is a bool": [{"answers": [True]}],
    "this is a dict": [{"answers": {"gold": ["Ann"]}}, {"answers": {"text": ["Ann"]}}],  # SQuAD's
    "answers: neither JSON nor a text": [{"answers": text} for text in [
        "['Ann', 'Bob']", "['Ann' 'Bob']", "[array(['Ann'], dtype=object)]", "['Ann', nan]",
        "['O'Brien']",
    ]],
    "context: neither JSON nor a text": [{"context": '[["A", "b" "c"]]'}],
    "paragraphs: .* is no paragraph": [{"paragraphs": [{"title": "A"}]}],
    "context: .* is no paragraph": [{"context": value} for value in [
        5, ["ab"], '["a", "b"]', [["a", None]], [["A", {"b": 1}]], [{"name": "a", "body": "b"}],
        {"title": "A", "sentences": "b"}, {"title": ["a", "b"], "sentences": [["c"]]},
    ]],
}  # fmt: skip


@pytest.mark.parametrize("words", WRONG)
def test_rows_of_wrong_types_are_named_in_one_line(words):
    for fields in WRONG[words]:
        good = {} if "reward_model" in fields else GOOD
        with pytest.raises(InputError, match=f"f:3: .*{words}"):
            data.question_row("f:3", good | fields)


PARAGRAPHS = [["A", "b c. D e."], ["F", "g."]]
SENTENCES = [["A", ["b c.", "D e."]], ["F", ["g."]]]


@pytest.mark.parametrize("name, value", [
    ("context", PARAGRAPHS),
    ("context", SENTENCES),
    ("context", [["A", ["b c. ", "D e."]], ["F", ["g."]]]),
    ("context", [["A", ["b c.", " D e.", ""]], ["F", ["", "g."]]]),
    ("context", json.dumps(SENTENCES)),
    ("context", json.dumps(PARAGRAPHS, indent=1)),
    ("context", {"title": ["A", "F"], "sentences": [["b c.", "D e."], ["g."]]}),
    ("context", '{"title": ["A", "F"], "sentences": [["b c.", "D e."], ["g."]]}'),
    ("context", [{"title": title, "text": text} for title, text in PARAGRAPHS]),
    ("paragraphs", [{"idx": 0, "title": t, "paragraph_text": p, "is_supporting": True}
                    for t, p in PARAGRAPHS]),
])  # fmt: skip
def test_paragraphs_are_the_same_in_every_form(name, value):
    found = data.question_row("f:1", {"question": "Who?", "answer": "Ann", name: value})
    assert found["context"] == "Document 1:\nA\nb c. D e.\n\nDocument 2:\nF\ng."


@given(st.text(max_size=40))
def test_a_text_is_read_as_it_is_unless_it_is_a_list_in_writing(text):
    row = {"question": "Who?", "answer": "Ann", "context": text}
    if text.strip()[:1] not in ("[", "{"):
        shown = data.question_row("f:1", row)["context"]
        assert shown == (text if text.strip() else "")


def test_names_that_say_the_same_and_aliases_are_golds_of_one_question():
    row = {"question": "Who? ", "input": "Who?", "answer": "Ann", "golden_answers": ["Ann"]}
    row |= {"answer_aliases": ["Anna", "Ann"], "all_classes": None, "choices": []}
    found = data.question_row("f:1", row)
    assert found["question"] == "Who?" and found["answers"] == ["Ann", "Anna"]


def test_questions_without_an_answer_are_left_out_and_counted(tmp_path, capsys):
    good = {"question": "Who?", "answer": "Ann", "answerable": True, "context": [["A", "b"]]}
    rows = [good, good | {"answerable": 0}, good | {"answer": "", "is_impossible": True}]
    path = write_jsonl(tmp_path / "q.jsonl", rows)
    assert len(data.load_questions(path)) == 1
    assert "q.jsonl: left out 2 questions, which have no answer" in capsys.readouterr().err
    out = str(tmp_path / "long.jsonl")
    assert not run("longqa", "--questions", path, "--documents", 1, "--out", out)
    assert len(data.load_questions(out)) == 1 and "left out 2 questions" in capsys.readouterr().err
    write_jsonl(tmp_path / "q.jsonl", [good | {"answerable": "no"}])
    with pytest.raises(InputError, match="q.jsonl:1: answerable: must be true or false"):
        data.load_questions(path)


def test_golds_that_joined_answers_cannot_give_are_left_out_and_counted(tmp_path, capsys):
    rows = [{"question": "A?", "answers": ["Arlen; Sornland", "Arlen"]}]
    rows += [{"question": "B; b?", "answers": ["Holt; 1811"]}, {"question": "C?", "answers": ["c"]}]
    path = write_jsonl(tmp_path / "q.jsonl", rows)
    for objectives in None, 1:  # one question is never split
        golds = [row["answers"] for row in data.load_questions(path, objectives)]
        flat = ["Arlen; Sornland", "Arlen"], ["Holt; 1811"], ["c"]
        assert golds == [[each] if objectives else each for each in flat]
    assert not capsys.readouterr().err
    (joined,) = data.load_questions(path, 2)
    assert (joined["question"], joined["answers"]) == ("A?; C?", [["Arlen"], ["c"]])
    said = capsys.readouterr().err
    assert "left out 2 golds that hold a ; at which answers are split, and 1 rows that have" in said
    joined = {"question": "A?; B?", "answers": [["x; y"], ["z"]]}
    other = {**joined, "answers": [["x"], ["y; z", "z"]]}
    path = write_jsonl(tmp_path / "q.jsonl", [joined, other])
    assert [row["answers"] for row in data.load_questions(path, 2)] == [[["x"], ["z"]]]


@pytest.mark.parametrize("sources, joined, rest", [("xxxyy", 2, 1), ("x", 0, 1)])
def test_questions_that_are_too_few_to_be_joined_are_counted(
    sources, joined, rest, tmp_path, capsys
):
    rows = [GOOD | {"data_source": source} for source in sources]
    path = write_jsonl(tmp_path / "q.jsonl", rows)
    if joined:
        assert len(data.load_questions(path, 2)) == joined
    else:
        with pytest.raises(InputError, match="q.jsonl: no questions"):
            data.load_questions(path, 2)
    said = capsys.readouterr().err
    assert f"q.jsonl: left out {rest} questions, too few to be joined by 2" in said


# ---- long documents ------------------------------------------------------------------------------


def hotpot(questions=20, paragraphs=5):
    for number in range(questions):
        titles = [f"Title {number}.{p}" for p in range(paragraphs - 1)]
        context = [[title, f"Text of {title}."] for title in titles] + [["Shared", f"Of {number}."]]
        question = {"question": f"Q{number}?", "answers": [f"a{number}"], "context": context}
        yield question | {"id": f"q{number}", "supporting_facts": [[titles[3], 0], ["Shared", 0]]}


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz"])
def test_long_documents_keep_their_paragraphs_and_share_no_title(name, tmp_path):
    source, orders = write_jsonl(tmp_path / "q.jsonl", hotpot()), set()
    assert not run("longqa", "--questions", source, "--documents", 40, "--out", tmp_path / name)
    for row, question in zip(hotpot(), data.load_questions(str(tmp_path / name)), strict=True):
        documents = re.fullmatch(r"Document 1:\n(.*)", question["context"], re.DOTALL)[1]
        documents = re.split(r"\n\nDocument \d+:\n", documents)
        titles = [document.split("\n")[0] for document in documents]
        assert len(set(titles)) == len(titles) == 40
        assert {f"{title}\n{text}" for title, text in row["context"]} <= set(documents)
        orders.add(tuple(titles.index(title) for title, _ in row["context"]))
        assert (question["question"], question["answers"]) == (row["question"], row["answers"])
    # a seed per question: the own paragraphs stand somewhere else each time
    assert len(orders) == 20


def test_documents_without_room_for_a_questions_own_paragraphs_are_refused(tmp_path, capsys):
    source, out = write_jsonl(tmp_path / "q.jsonl", hotpot()), tmp_path / "out.jsonl"
    for documents, words in (4, "q.jsonl:1: 5 paragraphs of its own"), (99, "81 paragraphs in all"):
        assert run("longqa", "--questions", source, "--documents", documents, "--out", out) == 2
        assert words in capsys.readouterr().err and not out.exists()


def test_long_documents_are_a_function_of_the_seed(tmp_path, capsys):
    bare = {"id": "x", "question": "Q?", "answers": ["no paragraphs"]}
    source, texts = write_jsonl(tmp_path / "q.jsonl", [*hotpot(), bare]), []
    for number, seed in enumerate([0, 0, 1]):
        out = tmp_path / str(number) / "out.jsonl"
        command = "longqa", "--questions", source, "--documents", 30, "--out", out, "--seed", seed
        assert not run(*command)
        texts.append(out.read_text())
    assert texts[0] == texts[1] != texts[2] and len(texts[0].splitlines()) == 20
    assert "left out 1 questions, which have no paragraphs" in capsys.readouterr().err


# ---- retrieval -----------------------------------------------------------------------------------


def test_bm25_finds_the_passage_and_leaves_out_what_shares_no_word(tmp_path):
    oslo = {"id": "3", "title": "Oslo", "text": "A city in Norway."}
    search = data.open_retriever(write_jsonl(tmp_path / "p.jsonl", [*PASSAGES, oslo]))
    norway, nothing, both = search(["where is norway", "zebra ?", "city"], 5)
    assert norway == [oslo] and nothing == []
    assert {hit["id"] for hit in both} == {"1", "3"}
    assert search([], 3) == []


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, tokenizer):
    """A random BERT under a name that asks for E5's prefixes; its tokenizer has no pad token."""
    import torch
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("models") / "tiny-e5"
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(BertConfig(vocab_size=600, **sizes)).save_pretrained(folder)
    assert tokenizer.pad_token is None
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_dense_search_equals_mean_pooling_and_inner_products_by_hand(tmp_path, encoder):
    import torch
    from transformers import AutoModel, AutoTokenizer

    rows = list(world(150))
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    model = AutoModel.from_pretrained(encoder).eval()

    @torch.no_grad()
    def embed(text):
        mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        return (mean / mean.norm()).numpy()

    passages = np.stack([embed(f"passage: {row['title']}\n{row['text']}") for row in rows])
    queries = [row["text"][:40] for row in rows[:70]]  # more than one batch of the encoder
    for _ in range(2):  # the second time with the vectors on disk
        search = data.open_retriever(path, encoder=encoder, cache=tmp_path / "cache")
        for query, hits in zip(queries, search(queries, 3), strict=True):
            scores = passages @ embed(f"query: {query}")
            found = [scores[int(hit["id"])] for hit in hits]
            assert np.allclose(found, np.sort(scores)[::-1][:3], atol=1e-5)
    assert len(list((tmp_path / "cache").iterdir())) == 1 and search([], 3) == []


def test_a_changed_corpus_gets_new_vectors(tmp_path, encoder):
    path = write_jsonl(tmp_path / "p.jsonl", PASSAGES)
    assert len(data.open_retriever(path, encoder, tmp_path / "cache")(["bears"], 9)[0]) == 2
    write_jsonl(tmp_path / "p.jsonl", PASSAGES + [{"id": "9", "title": "Bern", "text": "bears"}])
    assert len(data.open_retriever(path, encoder, tmp_path / "cache")(["bears"], 9)[0]) == 3


def test_other_weights_under_the_same_path_get_new_vectors(tmp_path, encoder):
    path, model = write_jsonl(tmp_path / "p.jsonl", PASSAGES), tmp_path / "tiny-e5"
    shutil.copytree(encoder, model)

    def files():
        data.open_retriever(path, str(model), tmp_path / "cache")
        return len(list((tmp_path / "cache").iterdir()))

    assert files() == files() == 1
    os.utime(model / "model.safetensors", (1, 1))  # as if others were copied there
    assert files() == 2


def test_documents_can_be_built_around_a_dense_neighbourhood(corpus, encoder, tmp_path):
    three, _ = build(corpus, tmp_path / "three", 3, "--encoder", encoder)
    one, _ = build(corpus, tmp_path / "one", 1, "--encoder", encoder)
    assert one == three[:1] and len(three) == 3


class Server(http.server.BaseHTTPRequestHandler):
    """Search-R1's contract over two passages; `plan` holds what goes wrong first."""

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, request))
        trouble = self.server.plan.pop(0) if self.server.plan else None
        if trouble == "cut":
            self.connection.close()
        elif trouble == "late":
            time.sleep(0.5)
        elif isinstance(trouble, str):
            self.reply(200, trouble.encode())
        elif trouble:
            self.reply(trouble, b"no")
        else:
            document = {"document": {"id": "7", "contents": '"Rome"\nA city.'}}
            self.reply(200, json.dumps({
                "result": [[document] * request["topk"]] * len(request["queries"])
            }).encode())  # fmt: skip

    def reply(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(data, "RETRY_SECONDS", (0, 0, 0, 0))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.plan, server.requests = [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}/retrieve"
    yield server
    server.shutdown()
    server.server_close()


def test_a_search_server_is_asked_once_for_all_queries(server):
    search = data.open_retriever(server.url)
    rome = {"id": "7", "title": "Rome", "text": "A city."}
    assert search(["a", "b"], 2) == [[rome] * 2] * 2
    request = {"queries": ["a", "b"], "topk": 2, "return_scores": True}
    assert server.requests == [("/retrieve", request)]
    assert search([], 2) == [] and search([" ", ""], 2) == [[], []] and len(server.requests) == 1
    found = search(["a", " ", "b"], 1)
    assert list(map(len, found)) == [1, 0, 1] and server.requests[1][1]["queries"] == ["a", "b"]


@pytest.mark.parametrize("plan", [[500, "cut", 503, 429], ["late"]])
def test_a_search_server_that_fails_or_is_late_is_asked_again(plan, server, monkeypatch):
    monkeypatch.setattr(data, "TIMEOUT_SECONDS", 0.2)
    server.plan = list(plan)
    assert data.open_retriever(server.url)(["a"], 1)[0][0]["title"] == "Rome"
    assert len(server.requests) == len(plan) + 1


def test_a_search_server_that_stays_down_or_refuses_is_an_error_in_one_line(server):
    server.plan = [503] * 9
    with pytest.raises(InputError, match="no answer in 5 attempts.*503"):
        data.open_retriever(server.url)(["a"], 1)
    with pytest.raises(InputError, match="no answer"):
        data.open_retriever("http://127.0.0.1:9/retrieve")(["a"], 1)
    with pytest.raises(InputError, match="no address of a search server"):
        data.open_retriever("http://HOST:PORT/retrieve")


@pytest.mark.parametrize("reply", [
    404,
    "<html>warming up</html>",
    "null",
    '{"answer": []}',
    '{"result": []}',
    '{"result": [["a"]]}',
    '{"result": [[{"contents": "Rome"}]]}',  # no "document"
    '{"result": [[{"document": "Rome"}]]}',
    '{"result": [[{"document": {"content": "Rome"}, "score": 1.0}]]}',
    '{"result": 5}',
    "\ud800".encode("utf-8", "surrogatepass").decode("latin1"),
])  # fmt: skip
def test_a_reply_of_another_form_is_an_error_at_once_with_query_and_address(server, reply):
    server.plan = [reply]
    with pytest.raises(InputError, match="'where is Rome'") as error:
        data.open_retriever(server.url)(["where is Rome"], 1)
    assert server.url in str(error.value) and "\n" not in str(error.value)
    assert len(server.requests) == 1


def test_a_server_on_this_machine_is_asked_without_the_proxy(server, monkeypatch):
    for name in "http_proxy", "HTTP_PROXY", "all_proxy":
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    for host in "127.0.0.1", "localhost":
        search = data.open_retriever(server.url.replace("127.0.0.1", host))
        assert search(["a"], 1)[0][0]["title"] == "Rome"
    with pytest.raises(InputError, match="no answer"):
        data.open_retriever(server.url.replace("127.0.0.1", "search.invalid"))(["a"], 1)


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("content, message", [
    ('{"text": "fine"}\n{"text": ', r"c.jsonl:2: not JSON"),
    ("[1, 2]\n", r"c.jsonl:1: a row must be a JSON object"),
    ('{"body": "x"}\n', r"c.jsonl:1: no text.*\['body'\]"),
    ("", "0 passages, a document needs 11"),
    ('{"text": "fine"}\n' * 50, "1 passages, a document needs 11"),
    ("".join(json.dumps({"text": f"nothing {'x' * n} here"}) + "\n" for n in range(50)),
     "no passage for train documents has an entity"),
    ("".join(json.dumps({"title": "Oslo", "text": f"Ann met {n}."}) + "\n" for n in range(50)),
     "a tenth of 1 articles is held out, and heldout has none"),
])  # fmt: skip
def test_a_bad_corpus_is_one_line_with_its_place_and_nothing_is_written(
    content, message, tmp_path, capsys
):
    (tmp_path / "c.jsonl").write_text(content)
    paths = ["--corpus", tmp_path / "c.jsonl", "--out", tmp_path / "out", "--documents", 2]
    assert run("build", *paths, "--ner", "rules", "--related", 4, "--random", 6) == 2
    # a bar, where the machine is slow
    shown = capsys.readouterr().err.replace("\r", "\n").splitlines()
    errors = [line for line in shown if line and "entities:" not in line]
    assert len(errors) == 1 and re.fullmatch(rf"error: .*{message}.*", errors[0])
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]


def test_a_corpus_that_is_not_there_is_said_before_a_pipeline_that_is_not_installed(
    tmp_path, capsys
):
    paths = "--corpus", tmp_path / "c.jsonl", "--out", tmp_path / "out", "--documents", 2
    assert run("build", *paths, "--ner", "no_such_pipeline") == 2
    assert "c.jsonl: no such file" in capsys.readouterr().err


ROW = b'{"text": "x"}\n'


@pytest.mark.parametrize("name, content, message", [
    ("none.jsonl", None, "no such file"),
    ("cut.jsonl.gz", gzip.compress(ROW * 1000)[:40], "can't be read"),
    ("after.jsonl.gz", gzip.compress(ROW) + b"no gz", "can't be read"),
    ("bad.parquet", b"no", "can't be read as parquet"),
    ("latin.jsonl", b'{"text": "\xe9"}\n', "can't be read.*utf-8"),
    ("utf16.jsonl", '{"text": "x"}'.encode("utf-16"), "can't be read as UTF-8"),
    ("utf16.txt", "some text".encode("utf-16"), "can't be read as UTF-8"),
    ("nul.txt", "some text".encode("utf-16-le"), "a NUL"),
    ("one.json", b'{"text": 1}', "a JSON list of rows is wanted"),
    ("broken.json", b'[\n{"a":\n]', "not JSON.*line 3"),
    ("twice.jsonl", b'{"text": "x", "meta": {"a": 1, "a": 2}}', "not JSON.*a key stands twice"),
    ("pretty.jsonl", b'{\n "text": "x"\n}', "not JSON.*a row in each line"),
    ("deep.jsonl", b'{"text": ' + b"[" * 10**5, "not JSON"),
    ("digits.jsonl", b'{"text": "x", "id": ' + b"1" * 5000 + b"}", "not JSON"),
    ("book.epub", b"x", "unknown kind of file"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_files_that_are_missing_broken_or_of_an_unknown_kind_are_errors(
    name, content, message, tmp_path
):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    line = ":1" if name.endswith((".jsonl", ".txt")) and re.match("a NUL|not JSON", message) else ""
    with pytest.raises(InputError, match=f"{name}{line}: {message}"):
        list(data.read_rows(str(tmp_path / name)))


def test_questions_and_documents_that_lack_something_are_errors(tmp_path):
    wrong = {"no answer; a row needs both": {"question": "Who?"}}
    wrong["context: .* is no paragraph"] = GOOD | {"context": [["title"]]}
    for message, row in wrong.items():
        with pytest.raises(InputError, match=f"q.jsonl:1: {message}"):
            data.load_questions(write_jsonl(tmp_path / "q.jsonl", [row]))
    with pytest.raises(InputError, match="no documents here"):
        data.load_documents(tmp_path, "train")


@pytest.mark.parametrize(
    "command", [["build", "--documents", 1, "--corpus"], ["longqa", "--questions"]]
)
def test_an_output_that_is_there_already_is_not_touched(command, corpus, tmp_path, capsys):
    (tmp_path / "out.jsonl").write_text("mine")
    assert run(*command, corpus, "--out", tmp_path / "out.jsonl") == 2
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_text() == "mine"


@pytest.mark.parametrize("arguments, message", [
    (["build", "--corpus", "c", "--out", "o", "--documents", "0"],
     "--documents 0: at least 1 is wanted"),
    (["build", "--corpus", "c", "--out", "o", "--documents", "1", "--relatd", "3"],
     "unrecognized arguments: --relatd"),
    (["build", "--corpus", ".", "--out", "o", "--documents", "1", "--ner", "xx_none"],
     "spacy download xx_none"),
    (["longqa", "--questions", "q", "--out", "o.csv"], "can be written"),
    ([], "arguments are required"),
])  # fmt: skip
def test_wrong_usage_ends_in_one_line_that_says_what_is_wrong_and_exit_status_2(
    arguments, message, tmp_path
):
    command = [sys.executable, ROOT / "data.py", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert re.search(rf"error: .*{message}.*\n\Z", done.stderr) and "Traceback" not in done.stderr


# ---- real data -----------------------------------------------------------------------------------


@real
def test_real_articles_become_documents_of_the_papers_size(tmp_path):
    sizes = ["--documents", 3, "--heldout", 0, "--max_passages", 700]
    required = ["--corpus", REAL / "wiki_articles_180.jsonl.gz", "--out", tmp_path / "docs"]
    assert not run("build", *required, *sizes, "--ner", "rules", "--processes", 2)
    for document in data.load_documents(tmp_path / "docs", "train"):
        assert 20_000 < len(document["text"].split()) < 28_000  # words; 24k-40k tokens
        assert not slow_pattern(document["answer"]).search(document["text"])
        names = [document["text"][a:b] for a, b in document["entities"]]
        assert not any(MASK in name or "\n" in name for name in names)


@real
@pytest.mark.parametrize("name, count", [
    ("rulerhqa_shaped_50.json", 16), ("hotpotqa_train.jsonl.gz", 700),
    ("musique_dev_even.jsonl.gz", 250), ("popqa_even.jsonl.gz", 968),
    ("nq_dev_even.jsonl.gz", 1805),
])  # fmt: skip
def test_real_questions_load(name, count):
    rows = data.load_questions(str(REAL / name))
    assert len(rows) == count and len({row["id"] for row in rows}) == count
    for row in rows:
        assert row["question"] and row["answers"]
        assert all(isinstance(answer, str) for answer in row["answers"])


@real
def test_bm25_finds_a_gold_paragraph_for_most_real_questions(tmp_path):
    rows = [row for _, row in data.read_rows(str(REAL / "hotpotqa_dev_even.jsonl.gz"))]
    pool = {title: text for row in rows for title, text in row["context"]}
    passages = [{"title": title, "text": text} for title, text in pool.items()]
    search, hit = data.open_retriever(write_jsonl(tmp_path / "p.jsonl", passages)), []
    for row, hits in zip(rows, search([row["question"] for row in rows], 3)):
        gold = {title for title, _ in row["supporting_facts"]}
        hit.append(any(passage["title"] in gold for passage in hits))
    assert np.mean(hit) > 0.85
