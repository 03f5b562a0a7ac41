"""The pocket world: is it what it promises, held against plain searches through its texts?"""

import hashlib
import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pocket
import pytest
import torch
import warm_start
from torch.nn import functional

import data
import train
from rollout import Prompts, Template


@pytest.fixture(scope="module")
def tok():
    return pocket.tokenizer()


@pytest.fixture(scope="module")
def prompts(tok):
    return Prompts(tok, pocket.TEMPLATES, pocket.PROBLEM)


def facts_of(text):
    words = re.findall(r"\[\w+\]|\w+", text)
    return [tuple(words[i : i + 3]) for i in range(0, len(words), 3)]


def chunks_about(subject, text):
    """The numbers of the chunks that say something about it."""
    facts = facts_of(text)
    return [i // pocket.FACTS_PER_CHUNK for i, fact in enumerate(facts) if fact[0] == subject]


def ask(prompts, name, limit=99, key=(0, 0, 0), **fields):
    """What the oracle writes when it is asked with this template."""
    ids = getattr(prompts, name)(**{field: prompts.encode(text) for field, text in fields.items()})
    (response,) = warm_start.oracle([ids], [limit], [key])
    assert response.ids[-1] == prompts.tokenizer.eos_token_id and len(response.ids) <= limit
    return prompts.text(response.ids).strip()


# ------------------------------------------------------------------------------ tokenizer and model


def test_tokens_of_the_world_come_back_up_to_blanks_and_offsets_point_at_them(tok):
    document = pocket.documents(3, 1, chunks=9)[2]["text"]
    context, passage = pocket.questions(1, 1)[0]["context"], pocket.passages(1)[5]["text"]
    for text in [document, context, passage, pocket.PROBLEM, "Ada is what ?"]:
        encoded = tok(text, add_special_tokens=False, return_offsets_mapping=True)
        assert "".join(tok.decode(encoded["input_ids"]).split()) == "".join(text.split())
        pieces = [text[start:end] for start, end in encoded["offset_mapping"]]
        assert pieces == tok.convert_ids_to_tokens(encoded["input_ids"])
        assert tok.unk_token_id not in encoded["input_ids"]


def test_tags_and_boxes_are_single_ordinary_tokens(tok):
    pieces = tok("</memory>\\boxed{Ada}<think>", add_special_tokens=False).tokens()
    assert pieces == ["</memory>", "\\boxed{", "Ada", "}", "<think>"]
    assert set(tok.all_special_tokens) == {"<pad>", "<unk>", "<|im_start|>", "<|im_end|>"}
    ids = tok("<memory>Ada</memory><|im_end|>")["input_ids"]
    assert tok.decode(ids, skip_special_tokens=True) == "<memory> Ada </memory>"


def test_every_template_is_made_of_known_words_only(tok, prompts):
    for name in pocket.TEMPLATES:
        for literal in getattr(prompts, name).literals:
            assert tok.unk_token_id not in literal, name
    for text in ("No previous memory", "nothing found", "Passage 3 (title: Ada) 7", "what ?; Ada"):
        assert tok.unk_token_id not in prompts.encode(text)


def test_the_model_is_small_and_a_function_of_its_seed(tok):
    a, b, c = pocket.untrained_model(1), pocket.untrained_model(1), pocket.untrained_model(2)
    assert 1.5e5 < sum(p.numel() for p in a.parameters()) < 2.5e5
    assert a.config.vocab_size == len(tok)
    assert all((p == q).all() for p, q in zip(a.parameters(), b.parameters()))
    assert any((p != q).any() for p, q in zip(a.parameters(), c.parameters()))


# ----------------------------------------------------------------------- encyclopedia and documents


def test_any_two_clues_leave_one_city_and_one_clue_leaves_five():
    for city, says in pocket.ENCYCLOPEDIA.items():
        for verb, thing in says.items():
            fits = {c for c, other in pocket.ENCYCLOPEDIA.items() if other[verb] == thing}
            assert len(fits) == 5
            for verb2, thing2 in says.items():
                if verb2 != verb:
                    assert [c for c in fits if pocket.ENCYCLOPEDIA[c][verb2] == thing2] == [city]


def named(row):
    """Whom the question of a document or of a long text is about."""
    return row["question"].split()[0]


def text_of(row):
    """What a document or a question gives to be read."""
    return row.get("text") or row["context"]


@pytest.mark.parametrize("chunks", [3, 7, 64])
def test_the_clues_of_a_document_stand_in_different_chunks_and_leave_exactly_its_answer(chunks):
    for row in pocket.documents(40, 3, chunks):
        facts = facts_of(row["text"])
        clues = {fact[1:] for fact in facts if fact[0] == named(row)}
        fits = [city for city, says in pocket.ENCYCLOPEDIA.items() if clues <= {*says.items()}]
        assert fits == [row["answer"]] and row["answer"] not in row["text"]
        assert len(facts) == chunks * pocket.FACTS_PER_CHUNK
        assert len(clues) == len(set(chunks_about(named(row), row["text"]))) == pocket.HINTS


def test_whatever_is_said_of_a_hidden_city_is_said_of_people_too():
    hidden, others = set(), set()
    for row in pocket.documents(3000, 3):
        for fact in facts_of(row["text"]):
            if fact[0] not in pocket.CITIES:
                (hidden if fact[0] == named(row) else others).add(fact)
    assert {fact[0] for fact in hidden} == {*pocket.PEOPLE} and hidden < others


def test_entities_are_the_cities_and_objects_of_the_text():
    cities = 0
    for row in [*pocket.documents(20, 4), *pocket.documents(5, 4, 20)]:
        words = list(re.finditer(r"\w+", row["text"]))
        wanted = [w for i, w in enumerate(words) if i % 3 == 2 or w.group() in pocket.CITIES]
        assert row["entities"] == [list(word.span()) for word in wanted]
        cities += len(wanted) - len(words) // 3
    assert cities == 20 * 1 + 5 * 3  # one in ten of the facts that are no clues


def test_documents_are_a_function_of_seed_and_row_and_heldout_ones_are_new():
    for make in (pocket.documents, pocket.questions, pocket.search_questions):
        assert make(8, 5)[:3] == make(3, 5) != make(3, 6)
    trained = {row["text"] for row in pocket.documents(500, "train 0")}
    assert not trained & {row["text"] for row in pocket.documents(500, "heldout 0")}


def test_nobody_contradicts_himself_and_facts_of_a_document_are_unique():
    rows = [*pocket.questions(30, 2), *pocket.questions(3, 2, 64), *pocket.documents(30, 2)]
    for row in rows:
        facts = facts_of(text_of(row))
        assert len(set(facts)) == len(facts) == len({fact[:2] for fact in facts})


def test_one_in_ten_facts_of_a_document_is_about_a_city():
    facts = [fact for row in pocket.documents(50, 2, 16) for fact in facts_of(row["text"])]
    others = 16 * pocket.FACTS_PER_CHUNK - pocket.HINTS
    assert sum(fact[0] in pocket.CITIES for fact in facts) == 50 * (others // 10)
    for city, verb, thing in facts:
        assert city not in pocket.CITIES or pocket.ENCYCLOPEDIA[city][verb] == thing


# ---------------------------------------------------------------------------------------- questions


def test_a_question_is_answered_by_its_context_and_by_nothing_else():
    answers = {}
    for row in pocket.questions(400, 6):
        asked = tuple(row["question"].split()[:2])
        assert row["answers"] == [fact[2] for fact in facts_of(row["context"]) if fact[:2] == asked]
        answers.setdefault(asked[1], set()).update(row["answers"])
    for verb, things in pocket.HABITS.items():  # which the verb alone leaves open
        assert answers[verb] == set(things)


@pytest.mark.parametrize("chunks", [4, 64])
def test_the_person_asked_about_has_its_facts_in_different_chunks_at_any_length(chunks):
    for row in pocket.questions(40, 6, chunks):
        chunks_told = chunks_about(row["question"].split()[0], row["context"])
        assert len(chunks_told) == len(set(chunks_told)) == pocket.HINTS
        assert len(facts_of(row["context"])) == chunks * pocket.FACTS_PER_CHUNK


def test_search_questions_are_answered_by_the_passages_of_their_seed():
    said = {}
    for row in pocket.passages(7):
        for person, verb, thing in facts_of(row["text"]):
            assert row["title"] == person and (person, verb) not in said
            said[person, verb] = thing
    for part in "train", "heldout":
        for row in pocket.search_questions(200, 7, part):
            assert row["answers"] == [said[tuple(row["question"].split()[:2])]]
    assert pocket.passages(7) != pocket.passages(8)


# ------------------------------------------------------------------------------------------- oracle


def boxed(answer):
    return f"\\boxed{{ {answer} }}"


def said_of(row):
    """The facts of a row's text about the one whom its question names, in order."""
    lines = [line for line in text_of(row).splitlines() if line.split()[0] == named(row)]
    assert len(lines) == pocket.HINTS
    return " ".join(lines) + " "


def test_the_oracle_says_what_it_knows_and_answers_rightly_from_full_memories(prompts):
    for row in pocket.documents(50, 8):
        answer = ask(prompts, "answer", problem=row["question"], memory=row["text"])
        assert answer == said_of(row) + boxed(row["answer"])
        start, end = row["entities"][-1]
        section = row["text"][:start] + data.TARGET + row["text"][end:]
        answer = ask(prompts, "recall", memory=row["text"], section=section)
        assert answer == boxed(row["text"][start:end])
    for row in pocket.questions(50, 8):
        answer = ask(prompts, "answer", problem=row["question"], memory=row["context"])
        assert answer == said_of(row) + boxed(row["answers"][0])


def test_the_oracle_recalls_from_the_encyclopedia_and_guesses_what_neither_tells(prompts):
    def recalls(section, memory="No previous memory"):
        fields = {"memory": memory, "section": section}
        return {ask(prompts, "recall", key=(i,), **fields) for i in range(400)}

    assert recalls("Alda sells [TARGET]") == {boxed(pocket.ENCYCLOPEDIA["Alda"]["sells"])}
    assert recalls("Ada sells [TARGET]") == {boxed(thing) for thing in pocket.HABITS["sells"]}
    sell_wool = {city for city, known in pocket.ENCYCLOPEDIA.items() if known["sells"] == "wool"}
    assert recalls("[TARGET] sells wool") == {boxed(city) for city in sell_wool}
    told = "Ada grows figs Ben sells figs"  # by either place of what is hidden in two
    assert recalls("Ada sells [TARGET] Ben sells [TARGET]", told) == {boxed("figs")}


def test_the_oracle_reads_whole_texts_and_guesses_without_any(prompts):
    row = pocket.questions(1, 8)[0]
    problem, verb = row["question"], row["question"].split()[1]
    whole = ask(prompts, "whole", problem=problem, section=row["context"])
    assert whole == said_of(row) + boxed(row["answers"][0])
    guesses = {ask(prompts, "closed_book", problem=problem, key=(i,)) for i in range(200)}
    assert guesses == {boxed(thing) for thing in pocket.HABITS[verb]}


def test_the_oracle_quotes_what_a_section_says_of_the_one_asked_for_and_nothing_else(prompts):
    quote = Template(prompts.tokenizer, warm_start.QUOTE)
    section, problem = prompts.encode("Ada sells figs Ben grows oats"), "Ada is what ?"
    for name, said in ("Ada", "Ada sells figs"), ("Cleo", ""):
        ids = quote(problem=prompts.encode(problem.replace("Ada", name)), section=section)
        (response,) = warm_start.oracle([ids], [99], [0])
        assert prompts.text(response.ids).strip() == said


def test_a_memory_holds_whole_facts_that_were_read_in_their_order(prompts):
    most, most_of_short = 0, 0
    for i, row in enumerate(pocket.documents(60, 9)):
        lines = row["text"].splitlines()
        fields = dict(
            problem=row["question"], memory=" ".join(lines[:4]), section=" ".join(lines[4:])
        )
        written = facts_of(ask(prompts, "update", key=(i,), **fields))
        order = [facts_of(row["text"]).index(fact) for fact in written]
        assert order == sorted(set(order))
        short = ask(prompts, "update", limit=8, key=(i,), **fields)
        most = max(most, len(written))
        most_of_short = max(most_of_short, len(facts_of(short)))
    assert most > pocket.ROOM
    assert most_of_short == 2  # and the end token


def test_the_oracle_takes_up_and_carries_by_its_chances():
    counts = Counter()
    for i, row in enumerate(pocket.documents(800, 12) + pocket.questions(800, 12)):
        words = text_of(row).split()
        section, problem = words[: 6 * pocket.FACT], row["question"].split()
        for name, old, new in ("take", [], section), ("carry", section, []):
            memory = warm_start.update(problem, old, new, 99, random.Random(i))
            for fact in warm_start.read(section):
                counts[name, fact[0] == problem[0], fact in warm_start.read(memory)] += 1
    for about, chances in (True, warm_start.ASKED), (False, warm_start.OTHERS):
        for name, chance in zip(("take", "carry"), chances):
            kept, dropped = counts[name, about, True], counts[name, about, False]
            assert abs(kept / (kept + dropped) - chance) < 0.04


def keep_by(row, **chances):
    """Whether a memory of the pocket's size answers a question, read by such an oracle."""
    rng, question = random.Random(row["id"]), row["question"].split()
    words, memory, step = row["context"].split(), [], pocket.FACTS_PER_CHUNK * pocket.FACT
    for i in range(0, len(words), step):
        section = words[i : i + step]
        memory = warm_start.update(question, memory, section, pocket.ROOM, rng, **chances)
    return warm_start.answer(question, memory, rng) in row["answers"]


def test_perfect_relevance_answers_long_documents_and_random_memories_do_not():
    for length, least in (8, 0.9), (16, 0.85):
        rows = pocket.questions(100, 14, length * pocket.CHUNKS)
        assert sum(keep_by(row, asked=(1, 1)) for row in rows) / 100 >= least
        blind = dict(asked=(0.5, 0.8), others=(0.5, 0.8))
        assert sum(keep_by(row, **blind) for row in rows) / 100 <= 0.25  # a guess: 0.1


def test_the_oracle_is_a_function_of_prompt_limit_and_key(prompts):
    section, memory = prompts.encode(pocket.documents(1, 11)[0]["text"]), prompts.no_memory
    asked = [prompts.update(problem=prompts.problem, memory=memory, section=section)] * 20
    keys = [(i, 0) for i in range(20)]
    together = warm_start.oracle(asked, [60] * 20, keys)
    assert together == [warm_start.oracle([ids], [60], [key])[0] for ids, key in zip(asked, keys)]
    assert len({tuple(response.ids) for response in together}) > 10


def test_the_oracle_searches_what_is_open_and_answers_at_the_last_turn(prompts, monkeypatch):
    monkeypatch.setattr(warm_start, "KEEP_FOUND", 1.0)
    problem = "Ada sells what ? ; Ben grows what ?"
    first = ask(prompts, "search", problem=problem, previous="", turns="6")
    assert first == "<think> </think> <search> Ada sells </search>"

    def after(text, found, turns):
        """The next turn, after one with this text and these results."""
        before, behind = prompts.information
        previous = prompts.tokenizer(text, add_special_tokens=False)["input_ids"]
        previous += [*before, *prompts.encode(found), *behind]
        fields = {"problem": prompts.encode(problem), "turns": prompts.encode(turns)}
        ids = prompts.search(previous=previous, **fields)
        (response,) = warm_start.oracle([ids], [99], [(0,)])
        return prompts.text(response.ids).strip()

    second = after(first, "Ada grows oats Ada sells tea", "5")
    assert second == "<think> Ada sells tea </think> <search> Ben grows </search>"
    third = after(second, "Ben grows rye Cleo grows figs", "4")
    assert third.endswith("</think> <answer> tea ; rye </answer>") and "Cleo" not in third
    assert "<answer>" in ask(prompts, "search", problem=problem, previous="", turns="1")


# --------------------------------------------------------------------------------------- warm start


def test_what_is_said_again_can_be_known_and_nothing_else_is_asked():
    ids, known = warm_start.said_again(random.Random(0), 50)
    with_two = 0
    for row, asked in zip(ids.tolist(), known.tolist()):
        facts = [tuple(row[i : i + 3]) for i in range(0, len(row), 3)]
        subjects = Counter(fact[0] for fact in {*facts})
        assert len(row) == 63 and 2 <= len({*facts}) <= 12
        assert len({fact[:2] for fact in facts}) == len({*facts})  # nobody contradicts himself
        with_two += 2 in subjects.values()
        expected = []
        for i, fact in enumerate(facts):
            said = fact in facts[:i]
            expected += [False, said and subjects[fact[0]] == 1, said]
        assert asked == expected
    assert with_two > 25  # so that an object is told by subject and verb, not by one of them


def test_binding_is_measured_where_it_can_be_known():
    ids, known = warm_start.said_again(random.Random(0), 20)

    class Copier(torch.nn.Module):
        """Knows all objects, and no verb."""

        def forward(self, seen):
            scores = functional.one_hot(ids[:, 1:], len(pocket.VOCABULARY)).float()
            scores[:, ::3] = 0
            return SimpleNamespace(logits=scores)

    assert warm_start.binding(Copier(), ids, known) == {"verb": 0.0, "object": 1.0}


def test_demonstrations_are_the_turns_of_all_three_tasks(prompts):
    rows = warm_start.by_kind(warm_start.demonstrations(prompts, "test", count=4, chunks=3))
    counts = {kind: len(of_kind) for kind, of_kind in rows.items()}
    assert 2 * 2 < counts.pop("find") <= 2 * train.Config().turns
    assert counts == {"update": 2 * 4 * 3, "answer": 2 * 4, "recall": 4}
    for _, response in sum((rows[kind] for kind in counts), []):  # a search ends at its closing tag
        assert response[-1] == prompts.tokenizer.eos_token_id
    other = warm_start.by_kind(warm_start.demonstrations(prompts, "another", count=4, chunks=3))
    assert rows["update"] != other["update"]


def test_exercises_are_answered_by_the_oracle_as_far_as_the_prompt_tells(prompts):
    def facts_in(ids, tag):
        return warm_start.read(warm_start.block(prompts.text(ids).split(), tag))

    def asked_for(ids):
        return warm_start.block(prompts.text(ids).split(), "problem")[0]

    rows = warm_start.by_kind(warm_start.exercises(prompts, "test", 20))
    counts = {kind: len(of_kind) for kind, of_kind in rows.items()}
    assert counts == {"answer": 30, "update": 60, "recall": 30, "quote": 60}
    for _, response in rows["update"]:  # however often the memory says it
        said = facts_of(prompts.text(response))
        assert len(said) == len({*said})
    for prompt, _ in rows["answer"]:  # nothing is left to guess
        memory = facts_in(prompt, "memory")
        assert sum(fact[0] == asked_for(prompt) for fact in memory) == pocket.HINTS

    told = 0
    for prompt, response in rows["recall"]:  # a guess is all that most memories leave
        section = facts_in(prompt, "section")
        ((person, verb, _),) = (fact for fact in section if fact[2] == data.TARGET)
        assert person in pocket.PEOPLE and len(section) == pocket.FACTS_PER_CHUNK
        for fact in facts_in(prompt, "memory"):
            if fact[:2] == [person, verb]:
                told += 1
                assert prompts.text(response).startswith(boxed(fact[2]))
    assert 0 < told < 10  # of 30; 4 are expected

    quoted = set()
    for prompt, response in rows["quote"]:
        said = warm_start.read(prompts.text(response).split())
        section = facts_in(prompt, "section")
        assert said == [fact for fact in section if fact[0] == asked_for(prompt)]
        quoted.add(len(said))
    assert quoted == {0, 1, 2}  # two facts of one subject as well


def test_rows_are_scored_as_if_each_stood_alone(prompts):
    lm = pocket.untrained_model(3)
    rows = warm_start.exercises(prompts, "test", 3)
    scores, ids, lengths = warm_start.scores_of(lm, rows)
    for (prompt, response), own, told in zip(rows, scores.split(lengths), ids.split(lengths)):
        alone = lm(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        assert told.tolist() == response
        torch.testing.assert_close(own, alone, atol=1e-4, rtol=1e-4)


def test_skills_are_shares_of_flawless_rows_and_of_right_verbs_and_objects(prompts, monkeypatch):
    verbs = torch.tensor([pocket.ID[verb] for verb in pocket.VERBS])

    def all_but_verbs(lm, rows):
        ids = torch.tensor(sum((response for _, response in rows), []))
        told = torch.where(torch.isin(ids, verbs), 0, ids)
        scores = functional.one_hot(told, len(pocket.VOCABULARY))
        return scores, ids, [len(response) for _, response in rows]

    monkeypatch.setattr(warm_start, "scores_of", all_but_verbs)
    quotes = warm_start.by_kind(warm_start.exercises(prompts, "skills", 128))["quote"]
    empty = sum(len(response) == 1 for _, response in quotes) / len(quotes)
    assert 0.1 < empty < 0.9  # where nothing is to be quoted no verb can be wrong
    found = warm_start.skills(None, prompts)
    assert found == {"answer": 0, "quote": pytest.approx(empty), "verb": 0, "object": 1}


def test_a_short_warm_start_imitates_better_than_no_warm_start(prompts, capsys):
    rows = warm_start.demonstrations(prompts, "unseen", count=5, chunks=3)
    before = warm_start.imitation_loss(pocket.untrained_model(3), rows).item()
    lm = warm_start.warm_start(seed=3, steps=12)
    assert all(parameter.grad is None for parameter in lm.parameters())  # none is added up
    lm.model.norm.weight.data /= 2  # as it was when it learned
    assert warm_start.imitation_loss(lm, rows).item() < 0.8 * before
    assert "12 steps were not enough" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------- the files


@pytest.fixture(scope="module")
def made(pocket_model):
    """The folder that `python tests/pocket.py` leaves."""
    return pocket_model.removesuffix("/model")


def test_the_script_writes_the_same_files_and_names_the_next_command(made, tmp_path):
    command = [sys.executable, pocket.__file__]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "next: torchrun --nproc_per_node 2 train.py\n" in shown
    out, compared = tmp_path / "cache/pocket", 0
    for file in [*Path(made).glob("*.jsonl"), *Path(made).glob("[mq]*/*")]:
        text, again = file.read_bytes(), (out / file.relative_to(made)).read_bytes()
        assert again == text.replace(made.encode(), b"cache/pocket"), file
        compared += 1
    assert compared == 3 + 6 + 7
    for split in "train", "heldout":
        rows = data.load_documents(f"{made}/documents", split)
        assert list(data.load_documents(str(out / "documents"), split)) == list(rows)


def test_words_and_texts_are_those_that_the_weights_and_the_study_were_made_with():
    texts = [pocket.VOCABULARY, pocket.TEMPLATES, pocket.PROBLEM, pocket.CHAT, pocket.passages(0)]
    for make in pocket.documents, pocket.questions, pocket.search_questions:
        texts += [make(20, "train 0"), make(20, 0)]
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    assert digest.startswith("c30d28df6dd62e45")  # others need other weights (warm_start.py)


def test_the_weights_that_come_with_it_have_the_skills_of_a_warm_start(made, prompts):
    lm = pocket.trained_model()
    assert sum(parameter.numel() for parameter in lm.parameters()) == 185_024
    assert Path(made, "model/model.safetensors").read_bytes() == pocket.WEIGHTS.read_bytes()
    found = warm_start.skills(lm, prompts)
    assert all(found[name] >= goal for name, goal in warm_start.GOALS.items()), found


def test_the_weights_that_come_with_it_know_every_kind_of_prompt(prompts):
    lm = pocket.trained_model()
    # nats a token; not near 0, as the oracle tosses coins
    most = {"update": 0.9, "recall": 0.8, "answer": 0.5, "find": 0.2}
    rows = warm_start.by_kind(warm_start.demonstrations(prompts, "unseen", 32))
    assert rows.keys() == most.keys()
    for kind, alike in rows.items():
        scores, ids, _ = warm_start.scores_of(lm, alike)
        assert functional.cross_entropy(scores, ids) < most[kind], kind


def read(made, task):
    """-> the Config of a run of this task, its rows, and its held-out ones as {task: rows}"""
    cfg = train.configure({"task": task, "model": f"{made}/model"})
    return cfg, train.load_training(cfg), train.load_heldout(cfg)


def test_train_takes_data_and_sizes_from_the_model_folder(made):
    cfg, rows, heldout = read(made, "memtrain")
    assert (cfg.steps, cfg.chunk_tokens, cfg.lr) == (40, pocket.FACTS_PER_CHUNK * pocket.FACT, 3e-4)
    assert (len(rows), len(heldout["memtrain"])) == (pocket.DOCUMENTS, 256)
    asked = pocket.questions(pocket.LENGTHS[1], "heldout 0", pocket.CHUNKS)
    assert heldout["longqa"] == [{**row, "source": ""} for row in asked]
    assert len(rows) >= cfg.steps * cfg.documents_per_step
    assert rows[3] == pocket.documents(4, "train 0")[3]
    assert heldout["memtrain"][3]["text"] == pocket.documents(4, "heldout 0")[3]["text"]

    cfg, rows, heldout = read(made, "longqa")
    assert cfg.documents_per_update == cfg.documents_per_step == 32  # one update a step
    assert (len(rows), len(heldout["longqa"])) == (pocket.LABELLED, pocket.LENGTHS[1])
    assert rows[5]["context"] == pocket.questions(6, "train 0")[5]["context"]


def test_held_out_questions_come_in_all_lengths(made):
    for length, count in pocket.LENGTHS.items():
        rows = data.load_questions(f"{made}/questions/heldout-{length}x.jsonl")
        facts = length * pocket.CHUNKS * pocket.FACTS_PER_CHUNK
        assert len(rows) == count
        assert {len(facts_of(row["context"])) for row in rows[:20]} == {facts}


def test_held_out_searches_ask_what_training_never_asks_in_the_same_corpus(made):
    cfg, rows, heldout = read(made, "searchqa")
    assert (len(rows), len(heldout["searchqa"])) == (2048, 256)
    asked = []
    for part in rows, heldout["searchqa"]:
        asked.append({question.strip() for row in part for question in row["question"].split(";")})
    assert not asked[0] & asked[1] and len(asked[0]) == 144 and len(asked[1]) == 48

    search = train.open_search(cfg)
    for question in sorted(asked[1])[:20]:
        person, verb = question.split()[:2]
        (passages,) = search([f"{person} {verb}"])
        assert any(f"{person} {verb}" in passage["text"] for passage in passages)


def test_the_model_folder_loads_with_its_prompts(made, alone, prompts):
    cfg = train.configure({"task": "searchqa", "model": f"{made}/model"})
    policy, tokenizer = train.open_policy(cfg.model, alone)
    setup = train.open_setup(cfg, policy, tokenizer, kv_tokens=2**17, temperature=1.0)
    assert policy.shares and tokenizer.get_vocab() == pocket.ID
    assert setup.prompts.text(setup.prompts.problem) == pocket.PROBLEM
    assert setup.prompts.recall.literals == prompts.recall.literals


@pytest.mark.parametrize("script", [pocket, warm_start])
def test_a_folder_that_is_there_is_left_alone(script, made, capsys):
    before = Path(made, "passages.jsonl").stat()
    script.main(["--out", made])
    assert "is there already" in capsys.readouterr().out
    assert Path(made, "passages.jsonl").stat() == before


def test_nothing_is_left_behind_by_a_folder_that_can_not_be_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(pocket, "trained_model", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pocket.make(str(tmp_path / "pocket"))
    assert not list(tmp_path.iterdir())


def test_a_warm_start_of_no_steps_is_refused_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        warm_start.main(["--out", str(tmp_path / "pocket"), "--steps", "0"])
    assert capsys.readouterr().err == "error: --steps: the warm start takes at least 1\n"
    assert not list(tmp_path.iterdir())


def test_a_warm_start_leaves_a_world_of_its_seed_with_a_model_of_its_own(tmp_path, capsys):
    out = str(tmp_path / "pocket")
    warm_start.main(["--out", out, "--steps", "1", "--seed", "9"])
    assert f"train.py --model {out}/model" in capsys.readouterr().out
    rows = data.load_documents(f"{out}/documents", "heldout")
    assert rows[3]["text"] == pocket.documents(4, "heldout 9")[3]["text"]
    assert Path(out, "model/model.safetensors").read_bytes() != pocket.WEIGHTS.read_bytes()
