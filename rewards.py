"""Answers and rewards: what counts as right, and what a trajectory earns for it.

Every function is total (any string goes in, nothing raises) and needs the standard library alone:
copy this file as it is.

    python rewards.py            checks the examples below and prints a few rewards

Differences from SQuAD's script:
  1. Answers and golds are compared in NFC, with typographic quotes and dashes as ASCII.
  2. One that normalises to nothing is compared as it stands. Elsewise "" would equal "the", and in
     MemAgent's two-directional match an empty answer would be inside every gold.
  3. F1 takes HotpotQA's rule for yes and no.
"""

import re
import string
import unicodedata
from collections import Counter

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ASCII = str.maketrans(
    dict.fromkeys("‘’‚‛′‹›", "'") | dict.fromkeys("“”„‟″«»", '"') | dict.fromkeys("‐‑‒–—―−", "-")
)
_FONT = re.compile(r"\s*\\(text(bf|it|rm|sf|tt|normal)?|math(bf|it|rm|sf|tt)|mbox|emph)\s*\{")


def extract_boxed(text):
    r"""The inside of the last balanced \boxed{...}, less blanks and a font around it, or None.

    >>> extract_boxed(r"first \boxed{Rome}, then \boxed{ the {Eternal} City }.")
    'the {Eternal} City'
    >>> extract_boxed(r"\boxed{Rome} and \boxed{never closed") # the last balanced one
    'Rome'
    >>> extract_boxed(r"\boxed{\text{Peta Holt}}"), extract_boxed(r"\boxed{\text{a} or \text{b}}")
    ('Peta Holt', '\\text{a} or \\text{b}')
    >>> extract_boxed("Rome") is None
    True
    """
    # one pass; of boxes inside boxes the outermost counts, as it closes last
    box, stack, ends = None, [], {}  # ends: where a brace opens -> where it closes
    for token in re.finditer(r"\\boxed\s*\{|[{}]", text):
        if token.group() != "}":
            stack.append(token)
        elif stack:
            opened = stack.pop()
            ends[opened.end()] = token.start()
            box = box if opened.group() == "{" else opened
    if box is None:
        return None
    start, end = box.end(), ends[box.end()]
    while font := _FONT.match(text, start, end):
        inner_end = ends[font.end()]
        if text[inner_end + 1 : end].strip():
            break
        start, end = font.end(), inner_end
    return text[start:end].strip()


def _plain(text):
    """Lower case in NFC, typographic quotes and dashes as ASCII."""
    return unicodedata.normalize("NFC", text.lower()).translate(_ASCII)


def normalize_answer(text):
    """SQuAD's normal form: lower case, no punctuation, no articles, single blanks.

    >>> normalize_answer("The  Beatles' (first) album!"), normalize_answer("Beatles’ first–album")
    ('beatles first album', 'beatles firstalbum')
    """
    text = _plain(text).translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def _comparable(text):
    """The normal form, or the text itself where nothing would be left of it ('The The', '!!!')."""
    return normalize_answer(text) or " ".join(_plain(text).split())


def _best(score, prediction, golds):
    """The best score over the golds; 0 for no prediction, a blank one, or no golds."""
    prediction = _comparable(prediction or "")
    golds = [golds] if isinstance(golds, str) else golds
    golds = [gold for gold in map(_comparable, golds) if gold]
    if not prediction or not golds:
        return 0.0
    return max(float(score(prediction, gold)) for gold in golds)


def exact_match(prediction, golds):
    """1.0 where the prediction equals any gold in normal form (EM of eq. 1 and 2).

    >>> exact_match("the Eiffel Tower", ["Eiffel tower."]), exact_match("Eiffel", ["Eiffel tower"])
    (1.0, 0.0)
    >>> exact_match(None, ["x"]), exact_match("", ["the"]), exact_match("The The", ["the the"])
    (0.0, 0.0, 1.0)
    """
    return _best(lambda answer, gold: answer == gold, prediction, golds)


def sub_exact_match(prediction, golds):
    """1.0 where any gold stands inside the prediction (as whole words).

    >>> sub_exact_match("It was Rome, Italy", ["Rome"]), sub_exact_match("Romeo", ["Rome"])
    (1.0, 0.0)
    """
    return _best(lambda answer, gold: f" {gold} " in f" {answer} ", prediction, golds)


def memagent_sub_em(prediction, golds):
    """MemAgent's sub_em, for its tables: by characters, gold in answer or answer in gold.

    >>> memagent_sub_em("Rome", ["Rome, Italy"]), memagent_sub_em("", ["Rome"])
    (1.0, 0.0)
    """
    return _best(lambda answer, gold: gold in answer or answer in gold, prediction, golds)


def token_f1(prediction, golds):
    """SQuAD's F1 over words, best over the golds. As in HotpotQA, 'yes', 'no' and 'noanswer' must
    match whole.

    >>> round(token_f1("the Eiffel Tower in Paris", ["Eiffel Tower"]), 3)
    0.667
    >>> token_f1("yes it is", ["yes"])
    0.0
    """
    def f1(answer, gold):
        if answer != gold and {answer, gold} & {"yes", "no", "noanswer"}:
            return 0.0
        answer, gold = answer.split(), gold.split()
        common = sum((Counter(answer) & Counter(gold)).values())
        return 2 * common / (len(answer) + len(gold))

    return _best(f1, prediction, golds)


def split_answers(text, n):
    """MEM1's answers to n questions, 'a1; a2', by position: always n long, missing ones are None.

    >>> split_answers("Rome; 1990 ; extra", 2), split_answers("Rome", 2), split_answers(None, 2)
    (['Rome', '1990'], ['Rome', None], [None, None])
    >>> split_answers("Rome; Italy", 1)
    ['Rome; Italy']
    """
    answers = [text or ""] if n == 1 else (text or "").split(";")[:n]  # one is never split
    answers = [answer.strip() or None for answer in answers]
    return answers + [None] * (n - len(answers))


def answer_reward(answer, golds):
    """What an answer earns in all tasks: R_I of a recall (eq. 1), EM in R_E (eq. 2), a question's
    reward. Another reward goes here, and here only: what is reported stays exact match.

    >>> answer_reward("the Nile", ["Nile"]), answer_reward(None, ["Nile"])
    (1.0, 0.0)
    """
    return exact_match(answer, golds)


def end_to_end_reward(correct, recall_rewards, weight=0.5, objective="full"):
    """R_E of one trajectory (eq. 2): EM of its answer + weight * mean reward of its recalls.

    >>> end_to_end_reward(1.0, [1.0, 0.0])
    1.25
    >>> end_to_end_reward(1.0, [1.0, 0.0], objective="decoupled")
    1.0
    """
    # decoupled and e2e (section 5.1), and documents with nothing to recall
    if objective != "full" or not recall_rewards:
        return correct
    return correct + weight * sum(recall_rewards) / len(recall_rewards)


if __name__ == "__main__":
    import doctest

    assert not doctest.testmod().failed
    for text in [r"It is \boxed{\text{Marie Curie}}.", "no box", r"\boxed{the {Curie} family}"]:
        answer = extract_boxed(text)
        print(f"{text!r}: answer {answer!r}, EM {exact_match(answer, ['Marie Curie'])}")
    print("R_E, right and 6 of 8 recalls:", end_to_end_reward(1.0, [1.0] * 6 + [0.0] * 2))
