"""Answers and rewards, against SQuAD's own rules and a slow plain reading of braces."""

import doctest
import re
import string
import time
import unicodedata
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rewards
from rewards import (
    end_to_end_reward,
    exact_match,
    extract_boxed,
    memagent_sub_em,
    normalize_answer,
    split_answers,
    sub_exact_match,
    token_f1,
)

SCORES = [exact_match, sub_exact_match, memagent_sub_em, token_f1]


def test_the_examples_in_the_docstrings_hold():
    result = doctest.testmod(rewards)
    assert result.attempted > 10 and not result.failed


# --------------------------------------------------------------------------------------- extraction


@pytest.mark.parametrize("text, answer", [
    (r"\boxed{a}", "a"),
    (r"so \boxed{a}, no: \boxed{b}.", "b"),
    (r"\boxed{\text{Peta Holt}}", "Peta Holt"),
    (r"\boxed{ \textbf { Peta Holt } }", "Peta Holt"),
    (r"\boxed{\mathrm{\mbox{Peta} Holt}}", r"\mbox{Peta} Holt"),
    (r"\boxed{\mathbf{\text{Peta {Holt}}}}", "Peta {Holt}"),
    (r"\boxed{\text{Peta} \text{Holt}}", r"\text{Peta} \text{Holt}"),
    (r"\boxed{\text{Peta} Holt}", r"\text{Peta} Holt"),
    (r"\boxed{the \text{Holt}}", r"the \text{Holt}"),
    (r"\boxed{\{Holt\}}", r"\{Holt\}"),
    (r"\boxed{\text{}}", ""),
    (r"\boxed{\textcolor{red}{Holt}}", r"\textcolor{red}{Holt}"),
    (r"\boxed{\text{\boxed{Rome}}}", r"\boxed{Rome}"),
    (r"\boxed{{{a}{b}}}", "{{a}{b}}"),
    (r"\boxed {a}", "a"),
    (r"\boxed{outer \boxed{inner}}", r"outer \boxed{inner}"),
    (r"\boxed{never closed \boxed{inner}", "inner"),
    (r"\boxed{a} \boxed{never {closed}", "a"),
    (r"} } \boxed{a} }", "a"),
    (r"{ \boxed{a}", "a"),
    (r"\boxed{}", ""),
    (r"\boxed{ }", ""),
    (r"\boxed{two" + "\n" + "lines}", "two\nlines"),
    (r"\boxed{", None),
    (r"\boxed a", None),
    ("boxed{a}", None),
    ("{a}", None),
    ("", None),
])  # fmt: skip
def test_the_last_balanced_box_is_the_answer(text, answer):
    assert extract_boxed(text) == answer


@given(st.lists(st.sampled_from([r"\boxed{", "{", "}", "a", " "]), max_size=14).map("".join))
def test_boxes_are_read_like_a_slow_search_over_all_pairs_of_braces_reads_them(text):
    def balanced(inside):
        depths = [inside[:n].count("{") - inside[:n].count("}") for n in range(len(inside) + 1)]
        return min(depths) == 0 == depths[-1]

    boxes = [  # the last to close wins; no two boxes close at the same brace
        (end, text[start.end() : end])
        for start in re.finditer(r"\\boxed\{", text)
        for end in range(start.end(), len(text))
        if text[end] == "}" and balanced(text[start.end() : end])
    ]
    assert extract_boxed(text) == (max(boxes)[1].strip() if boxes else None)


FONTS = ["text", "textbf", "textit", "textrm", "mathrm", "mathbf", "mbox"]


@given(
    st.text("ab \n;é", max_size=6),
    st.lists(st.sampled_from(FONTS), max_size=4),
    st.sampled_from(["", " ", "\n"]),
)
def test_an_answer_is_the_same_whatever_font_all_of_it_is_set_in(answer, fonts, blank):
    shown = answer
    for font in fonts:
        shown = f"{blank}\\{font}{{{shown}}}{blank}"
    assert extract_boxed(f"It is \\boxed{{{shown}}}.") == answer.strip()


BRACES = ["{", "}", "{}", r"\boxed{", r"\boxed", r"\boxed ", r"\boxed{}", "\\"]


@pytest.mark.parametrize("levels", ["\\boxed{", "\\text{", "{"])
def test_a_hundred_thousand_levels_of_braces_take_linear_time(levels):
    started = time.perf_counter()
    assert extract_boxed("\\boxed{" + levels * 100_000 + "x" + "}" * 100_001)
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("piece", [*BRACES, " ", "a ", "a;", "the "])
def test_a_megabyte_takes_no_longer_than_linear_time(piece):
    text = piece * (1_000_000 // len(piece))
    started = time.perf_counter()
    extract_boxed(text)
    split_answers(text, 3)
    for score in SCORES:
        score(text[:100_000], ["Rome", text[:99_999]])
    assert time.perf_counter() - started < 10  # a fraction of a second; quadratic would be hours


def test_blanks_after_boxed_are_read_once():
    started = time.perf_counter()
    extract_boxed(r"\boxed" + " " * 1_000_000 + "x" + r"\boxed " * 100_000)
    assert time.perf_counter() - started < 5


# ------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("text, normal", [  # by the rules of SQuAD's evaluate-v1.1.py
    ("The  Cat.", "cat"),
    ("a an the", ""),
    ("An apple-pie", "applepie"),
    ("Theatre", "theatre"),
    ("U.S.A.", "usa"),
    ("Île-de-France", "îledefrance"),
    ("tab\tand\nline", "tab and line"),
])  # fmt: skip
def test_answers_are_normalised_by_squads_rules(text, normal):
    assert normalize_answer(text) == normal


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("answer, gold", [
    ("Zoe\u0308 Saldan\u0303a", "Zoë Saldaña"),  # NFD
    ("O’Brien", "O'Brien"),
    ("“Heroes”", '"Heroes"'),
    ("1939–1945", "1939-1945"),
    ("Jean‑Luc", "Jean-Luc"),
    ("—", "-"),  # nothing else is left to compare
    ("ZOE\u0308", "zoë"),
    ("J\u030cn", "ǰn"),  # a capital that has no NFC form
])  # fmt: skip
def test_what_is_written_in_another_way_is_the_same_answer(score, answer, gold):
    assert score(answer, [gold]) == score(gold, [answer]) == 1


@given(st.text())
def test_a_gold_is_met_by_its_copy_in_any_normal_form_and_in_any_quotes(text):
    for form in ("NFC", "NFD"):
        other = unicodedata.normalize(form, text).translate(str.maketrans("'\"-", "’”–"))
        assert normalize_answer(other) == normalize_answer(text)
        assert exact_match(other, [text]) == float(bool(text.strip()))


@given(st.text(string.printable))
def test_ascii_is_normalised_as_squads_script_does(text):
    assert normalize_answer(text) == squad_normal(text)


def squad_normal(text):  # SQuAD's evaluate-v1.1.py, step by step
    text = "".join(ch for ch in text.lower() if ch not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def squad_f1(prediction, gold):
    prediction, gold = squad_normal(prediction).split(), squad_normal(gold).split()
    same = sum((Counter(prediction) & Counter(gold)).values())
    if not same:
        return 0.0
    precision, recall = same / len(prediction), same / len(gold)
    return 2 * precision * recall / (precision + recall)


WORDS = ["the", "The", "a", "cat", "Cat.", "dog", "dog's", "-", "ran"]
words = st.lists(st.sampled_from(WORDS), max_size=6).map(" ".join)


@given(words, st.lists(words, max_size=3))
def test_em_and_f1_are_squads_wherever_something_is_left_to_compare(prediction, golds):
    comparable = [gold for gold in golds if squad_normal(gold)]
    if not squad_normal(prediction) or len(comparable) < len(golds):
        return
    equal = [squad_normal(prediction) == squad_normal(gold) for gold in golds]
    assert exact_match(prediction, golds) == max(equal, default=0)
    f1 = [squad_f1(prediction, gold) for gold in golds]
    assert token_f1(prediction, golds) == pytest.approx(max(f1, default=0))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("nothing", [None, "", " ", "\n\t"])
def test_an_empty_answer_never_counts_and_an_empty_gold_is_never_met(score, nothing):
    for golds in ([], [""], [" "], ["the"], ["..."], ["Rome"], ["", "Rome"]):
        assert score(nothing, golds) == 0
    for answer in ("Rome", "the", "...", ""):
        assert score(answer, [nothing or ""]) == 0
        assert score(answer, []) == 0


@pytest.mark.parametrize("score", SCORES)
def test_an_answer_without_content_meets_only_a_gold_that_reads_alike(score):
    assert score("The The", ["the the"]) == 1
    for answer in ("the", "...", "a", "?!"):
        assert score(answer, ["Rome"]) == 0
    assert exact_match("the", ["..."]) == exact_match("the", ["an"]) == 0


@pytest.mark.parametrize("score", SCORES)
def test_any_gold_will_do_and_one_string_is_one_gold(score):
    assert score("Rome", ["Paris", "rome."]) == 1
    assert score("Rome", "Rome") == 1
    assert score("R", "xyz") == 0


@given(st.text(), st.lists(st.text(), max_size=3))
def test_every_score_takes_any_text_and_lies_between_0_and_1(prediction, golds):
    em, sub, both, f1 = (score(prediction, golds) for score in SCORES)
    assert all(isinstance(value, float) and 0 <= value <= 1 for value in (em, sub, both, f1))
    assert em <= min(sub, f1) and sub <= both  # each is laxer than the one before
    extract_boxed(prediction)


def test_sub_em_is_one_way_by_words_and_memagents_two_way_by_characters():
    assert sub_exact_match("in Rome, Italy", ["Rome"]) == 1
    assert sub_exact_match("Rome", ["Rome, Italy"]) == 0
    assert sub_exact_match("Romeo", ["Rome"]) == 0
    assert memagent_sub_em("Romeo", ["Rome"]) == 1
    assert memagent_sub_em("Rome", ["Rome, Italy"]) == 1


def test_yes_and_no_must_match_whole_in_f1():
    assert token_f1("no", ["no"]) == 1
    assert token_f1("no doubt", ["no"]) == 0
    assert token_f1("yes", ["yes sir"]) == 0
    assert token_f1("noanswer given", ["noanswer"]) == 0


# ------------------------------------------------------------------------------ answers and rewards


@given(st.none() | st.text(alphabet="ab; \n"), st.integers(0, 5))
def test_split_answers_is_always_n_long_and_its_entries_are_none_or_not_blank(text, n):
    answers = split_answers(text, n)
    assert len(answers) == n
    assert all(answer is None or answer == answer.strip() != "" for answer in answers)


def test_answers_keep_their_positions():
    assert split_answers("; Rome", 2) == [None, "Rome"]
    assert split_answers("a; b; c", 2) == ["a", "b"]
    assert split_answers("a;;c", 3) == ["a", None, "c"]


def test_the_end_to_end_reward_adds_the_mean_recall_only_in_the_full_objective():
    recalls = [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert end_to_end_reward(1.0, recalls) == 1.0 + 0.5 * 2 / 8  # eq. 2 with lambda = 0.5
    assert end_to_end_reward(0.0, recalls, weight=2.0) == 2.0 * 2 / 8
    for objective in ("decoupled", "e2e"):
        assert end_to_end_reward(0.0, recalls, objective=objective) == 0.0
        assert end_to_end_reward(1.0, recalls, objective=objective) == 1.0
    assert end_to_end_reward(1.0, []) == 1.0
