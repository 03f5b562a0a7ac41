"""The pocket world: is it what its docstrings promise, held against plain searches through text and encyclopedia?"""
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
import tiny  # noqa: E402


@pytest.fixture(scope="module")
def tok():
    return tiny.tokenizer()


def words_of(text):
    return re.findall(r"\[\w+\]|\w+", text)


def facts_of(text):
    words = words_of(text)
    return [tuple(words[i:i + 3]) for i in range(0, len(words), 3)]


def prompt(tok, name, **fields):
    message = [{"role": "user", "content": tiny.TEMPLATES[name].format(**fields)}]
    return tok(tok.apply_chat_template(message, tokenize=False, add_generation_prompt=True), add_special_tokens=False)["input_ids"]


def ask(tok, name, limit=99, key=(0, 0, 0), oracle=None, **fields):
    (response,) = tiny.oracle([prompt(tok, name, **fields)], [limit], [key], **(oracle or {}))
    assert response[-1] == tok.eos_token_id and len(response) <= limit
    return tok.decode(response[:-1])


# ------------------------------------------------------------------------------------------------ tokenizer and model
def test_tokens_of_the_world_come_back_up_to_blanks_and_offsets_point_at_them(tok):
    for text in [tiny.documents(3, 1, chunks=9)[2]["text"], tiny.questions(1, 1)[0]["context"], tiny.passages(1)[5]["text"], tiny.PROBLEM]:
        encoded = tok(text, add_special_tokens=False, return_offsets_mapping=True)
        assert "".join(tok.decode(encoded["input_ids"]).split()) == "".join(text.split())
        assert [text[a:b] for a, b in encoded["offset_mapping"]] == tok.convert_ids_to_tokens(encoded["input_ids"])
        assert tok.unk_token_id not in encoded["input_ids"]


def test_tags_and_boxes_are_single_ordinary_tokens(tok):
    assert tok("</memory>\\boxed{Ada}<think>", add_special_tokens=False).tokens() == ["</memory>", "\\boxed{", "Ada", "}", "<think>"]
    assert not set(tiny.TAGS) & set(tok.all_special_tokens)
    assert tok.decode(tok("<memory>Ada</memory><|im_end|>")["input_ids"], skip_special_tokens=True) == "<memory> Ada </memory>"


def test_every_template_is_made_of_known_words_only(tok):
    fields = dict(problem=tiny.PROBLEM, memory="No previous memory", section="Ada likes tea", previous="", turns=5)
    for name in tiny.TEMPLATES:
        assert tok.unk_token_id not in prompt(tok, name, **fields), name


def test_the_model_is_small_and_a_function_of_its_seed(tok):
    a, b, c = tiny.model(1), tiny.model(1), tiny.model(2)
    assert 4e5 < sum(p.numel() for p in a.parameters()) < 6e5 and a.config.vocab_size == len(tok)
    same = [(p == q).all().item() for p, q in zip(a.parameters(), b.parameters())]
    assert all(same) and any((p != q).any() for p, q in zip(a.parameters(), c.parameters()))


# ------------------------------------------------------------------------------------------- encyclopedia and documents
def test_any_two_clues_leave_one_city_and_one_clue_leaves_five():
    for city, says in tiny.ENCYCLOPEDIA.items():
        for verb, thing in says.items():
            assert sum(other[verb] == thing for other in tiny.ENCYCLOPEDIA.values()) == 5
            for verb2, thing2 in says.items():
                fits = [c for c, other in tiny.ENCYCLOPEDIA.items() if (other[verb], other[verb2]) == (thing, thing2)]
                assert (fits == [city]) == (verb != verb2)


@pytest.mark.parametrize("chunks", [1, 3, 7, 96])
def test_the_clues_of_a_document_leave_exactly_its_answer(chunks):
    for row in tiny.documents(40, 3, chunks):
        clues = [(v, o) for s, v, o in facts_of(row["text"]) if s == tiny.MASK]
        fits = [city for city, says in tiny.ENCYCLOPEDIA.items() if all(says[v] == o for v, o in clues)]
        assert len(clues) >= 2 and fits == [row["answer"]] and row["answer"] not in row["text"]


def test_clues_stand_in_different_chunks():
    for row in tiny.documents(40, 3, 5):
        facts = facts_of(row["text"])
        homes = [i // tiny.FACTS_PER_CHUNK for i, fact in enumerate(facts) if fact[0] == tiny.MASK]
        assert len(facts) == 5 * tiny.FACTS_PER_CHUNK and len(set(homes)) == len(homes)


def test_entities_are_exactly_the_subjects_and_objects_of_the_text():
    for row in [*tiny.documents(20, 4), *tiny.documents(5, 4, 20)]:
        spans = [list(match.span()) for match in re.finditer(r"\[?\w+\]?", row["text"])]
        wanted = [span for i, span in enumerate(spans) if i % 3 != 1 and row["text"][slice(*span)] != tiny.MASK]
        assert row["entities"] == wanted


def test_documents_are_a_function_of_seed_and_place_and_heldout_ones_are_new():
    for make in (tiny.documents, tiny.questions, tiny.search_questions):
        assert make(8, 5)[:3] == make(3, 5) != make(3, 6)
    trained = {row["text"] for row in tiny.documents(500, 0)}
    assert not trained & {row["text"] for row in tiny.documents(500, tiny.HELDOUT_SEED)}


def test_nobody_contradicts_himself_and_facts_of_a_short_document_are_unique():
    for row in [*tiny.questions(30, 2), *tiny.questions(3, 2, 96)]:
        facts = facts_of(row["context"])
        assert all(len({o for s2, v2, o in facts if (s2, v2) == (s, v)}) == 1 for s, v, _ in facts)
        if len(facts) == 8:
            assert len(set(facts)) == 8


# ------------------------------------------------------------------------------------------------------------ questions
def test_a_question_is_answered_by_its_context_and_by_nothing_else():
    answers = {}
    for row in tiny.questions(400, 6):
        person, verb = row["question"].split()[:2]
        assert row["answers"] == [o for s, v, o in facts_of(row["context"]) if (s, v) == (person, verb)]
        answers.setdefault(verb, set()).update(row["answers"])
    assert all(len(answers[verb]) == len(tiny.HABITS[verb]) for verb in tiny.HABITS)  # the verb alone leaves all things open


@pytest.mark.parametrize("chunks", [4, 128])
def test_the_person_asked_about_has_two_facts_in_different_chunks_at_any_length(chunks):
    for row in tiny.questions(40, 6, chunks):
        facts = facts_of(row["context"])
        homes = [i // tiny.FACTS_PER_CHUNK for i, fact in enumerate(facts) if fact[0] == row["question"].split()[0]]
        assert len(facts) == chunks * tiny.FACTS_PER_CHUNK and len(homes) == len(set(homes)) == 2


def test_search_questions_are_answered_by_the_passages_of_their_seed():
    corpus = {name: " ".join(row["text"] for row in tiny.passages(7) if row["title"] == name) for name in tiny.PEOPLE}
    for row in tiny.search_questions(50, 7):
        person, verb = row["question"].split()[:2]
        assert [o for s, v, o in facts_of(corpus[person]) if (s, v) == (person, verb)] == row["answers"]
        assert row["question"].split()[0] in tiny.lookup(tiny.passages(7))([" ".join((person, verb))])[0][0]["text"]
    assert tiny.passages(7) != tiny.passages(8) and tiny.lookup(tiny.passages(7))(["nothing known"]) == [[]]


# --------------------------------------------------------------------------------------------------------------- oracle
def test_the_oracle_answers_rightly_from_full_memories(tok):
    for row in tiny.documents(50, 8):
        assert ask(tok, "answer", problem=tiny.PROBLEM, memory=row["text"]) == f"\\boxed{{ {row['answer']} }}"
        start, end = row["entities"][3]
        section = row["text"][:start] + tiny.TARGET + row["text"][end:]
        assert ask(tok, "recall", memory=row["text"], section=section) == f"\\boxed{{ {row['text'][start:end]} }}"
    for row in tiny.questions(50, 8):
        assert ask(tok, "answer", problem=row["question"], memory=row["context"]) == f"\\boxed{{ {row['answers'][0]} }}"


def test_the_oracle_reads_whole_texts_and_guesses_without_any(tok):
    row = tiny.questions(1, 8)[0]
    assert ask(tok, "whole", problem=row["question"], section=row["context"]) == f"\\boxed{{ {row['answers'][0]} }}"
    guesses = {ask(tok, "closed_book", problem=row["question"], key=(i,)) for i in range(60)}
    assert len(guesses) == len(tiny.HABITS[row["question"].split()[1]])


def test_the_oracle_keeps_only_what_it_reads_and_as_much_as_it_is_told_to(tok):
    kept = {keep: 0 for keep in (0.2, 0.6, 1.0)}
    for i, row in enumerate(tiny.documents(60, 9, 4)):
        facts = row["text"].splitlines()
        memory, section = " ".join(facts[:4]), " ".join(facts[4:])
        for keep in kept:
            written = facts_of(ask(tok, "update", key=(i,), oracle={"keep": keep, "keep_asked": keep}, problem=tiny.PROBLEM, memory=memory, section=section))
            order = [facts_of(memory + " " + section).index(fact) for fact in written]
            assert order == sorted(set(order))
            kept[keep] += len(written)
    assert 60 * 4 < kept[0.2] < kept[0.6] < kept[1.0] == 60 * 8  # what the memory holds is kept, what is new is chosen from
    short = ask(tok, "update", limit=11, oracle={"keep": 1.0, "keep_asked": 1.0}, problem=tiny.PROBLEM, memory=memory, section=section)
    assert len(facts_of(short)) == 3  # whole facts only: three and the end token


def test_the_oracle_drops_any_fact_alike_whatever_the_question(tok):
    survived = {True: [], False: []}
    for i, row in enumerate(tiny.documents(400, 10, 4)):
        facts = row["text"].split("\n")
        section = " ".join(fact for fact in facts if fact)
        written = facts_of(ask(tok, "update", limit=16, key=(i,), oracle={"keep": 1.0, "keep_asked": 1.0}, problem=tiny.PROBLEM, memory="", section=section))
        assert len(written) == 5
        for fact in facts_of(row["text"]):
            survived[fact[0] == tiny.MASK].append(fact in written)
    share = {about: sum(s) / len(s) for about, s in survived.items()}
    assert abs(share[True] - 5 / 8) < 0.06 and abs(share[False] - 5 / 8) < 0.04


def test_the_oracle_takes_up_more_of_what_the_problem_names(tok):
    taken = {True: [], False: []}
    rows = [(tiny.PROBLEM, row["text"], tiny.MASK) for row in tiny.documents(300, 12)]
    rows += [(row["question"], row["context"], row["question"].split()[0]) for row in tiny.questions(300, 12)]
    for i, (problem, text, named) in enumerate(rows):
        written = facts_of(ask(tok, "update", key=(i,), problem=problem, memory="", section=text))
        for fact in facts_of(text):
            taken[fact[0] == named].append(fact in written)
    share = {about: sum(s) / len(s) for about, s in taken.items()}
    assert abs(share[True] - 0.5) < 0.06 and abs(share[False] - 0.3) < 0.04


def test_the_oracle_is_a_function_of_prompt_key_and_seed(tok):
    row = tiny.documents(1, 11)[0]
    prompts = [prompt(tok, "update", problem=tiny.PROBLEM, memory="No previous memory", section=row["text"])] * 20
    keys = [(i, 0) for i in range(20)]
    together = tiny.oracle(prompts, [60] * 20, keys)
    assert together == [tiny.oracle([p], [60], [k])[0] for p, k in zip(prompts, keys)]
    assert len({tuple(response) for response in together}) > 10
    assert together != tiny.oracle(prompts, [60] * 20, keys, seed=1)


def test_the_oracle_searches_what_is_open_and_answers_at_the_last_turn(tok):
    problem, sure = "Ada likes what ? ; Ben owns what ?", {"keep_found": 1.0}
    assert ask(tok, "search", problem=problem, previous="", turns=6, oracle=sure) == "<think> </think> <search> Ada likes </search>"
    found = "<think> </think> <search> Ada likes </search> <information> Ada owns cat Ada likes tea </information>"
    first = ask(tok, "search", problem=problem, previous=found, turns=5, oracle=sure)
    assert first == "<think> Ada likes tea </think> <search> Ben owns </search>"
    found = first + " <information> Ben owns dog Cleo owns goat </information>"
    last = ask(tok, "search", problem=problem, previous=found, turns=4, oracle=sure)
    assert last.endswith("</think> <answer> tea ; dog </answer>") and "Cleo" not in last
    assert "<answer>" in ask(tok, "search", problem=problem, previous="", turns=1, oracle=sure)


def test_the_demo_runs():
    shown = subprocess.run([sys.executable, tiny.__file__], capture_output=True, text=True, check=True).stdout
    assert "memory" in shown and "\\boxed{" in shown


# ---------------------------------------------------------------------------------------------------------------- study
def test_the_interval_over_seeds_is_students():
    mean, half = tiny.spread([0.2, 0.3, 0.7])
    assert mean == pytest.approx(0.4) and half == pytest.approx(4.303 * 0.26458 / 3**0.5, rel=1e-3)
    assert tiny.spread([0.5]) == (0.5, None)


def test_an_oracle_memory_answers_all_a_guess_one_in_eight_and_random_facts_lie_between():
    scores = tiny.guesses(tiny.questions(600, 13), room=4)
    assert scores["oracle memory"] == 1
    assert abs(scores["guess"] - 1 / 8) < 0.05 and abs(scores["random facts"] - (1 / 2 + 1 / 2 / 8)) < 0.07


def test_every_arm_of_the_study_starts_from_one_before_it_and_every_claim_compares_two_of_them():
    runs = list(tiny.arms(24).items())
    for i, (_, (start, _)) in enumerate(runs):
        assert start is None or start in dict(runs[:i])
    assert {arm for pair in tiny.CLAIMS.values() for arm in pair} <= {*dict(runs)}


def test_the_report_shows_means_over_seeds_and_pairs_differences_by_seed():
    results = {name: {1: [0.1, 0.5, 0.9], 2: [0.1, 0.5, 0.9]} for name in tiny.arms(24)}
    results["full"] = {1: [0.2, 0.6, 1.0], 2: [0.1, 0.5, 0.9]}
    looks = {"E2E before": 0.25, "E2E after": 0.75, "recall before": 0.5, "recall after": 0.5}
    lines = tiny.report(results, dict.fromkeys(("full", "e2e"), [looks] * 3), [1, 2]).splitlines()
    assert "| full | 60.0 ± 99.3 | 50.0 ± 99.3 | 55.0 ± 99.3 |" in lines
    assert "| (a) MemTrain alone: full - warm | 10.0 ± 0.0 | 0.0 ± 0.0 | 5.0 ± 0.0 |" in lines
    assert "| e2e | 25.0 ± 0.0 | 75.0 ± 0.0 | 50.0 ± 0.0 | 50.0 ± 0.0 |" in lines


def test_a_run_of_the_study_that_fails_is_named_with_its_log(tmp_path):
    with pytest.raises(SystemExit, match=r"train.py --steps many .* failed: see .*warm-0.log; the same study goes on"):
        tiny.run_arms(tmp_path, {"warm": (None, ["--steps", "many"]), "full": ("warm", [])}, 1, [])
    assert "many" in (tmp_path / "warm-0.log").read_text() and not (tmp_path / "full-0.log").exists()
