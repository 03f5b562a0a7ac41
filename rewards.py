"""Answers and rewards: what counts as right, and what a trajectory earns for it.

Every function is total (any string goes in, nothing raises), linear in the length of its input and
needs the standard library alone: copy this file as it is.

    python rewards.py            runs the examples below and prints a few rewards

Differences from the neighbours:
  1. A gold or an answer that normalises to nothing is compared as it stands ("squad"). Under the
     plain SQuAD rule "" would equal "the", and in MemAgent's two-directional match an empty answer
     would be inside every gold.
  2. No format reward anywhere: MEM1's was reported to hurt.
"""

import re
import string
from collections import Counter

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def extract_boxed(text):
    r"""The inside of the last balanced \boxed{...}, its own braces kept, blanks stripped, or None.

    >>> extract_boxed(r"first \boxed{Rome}, then \boxed{ the {Eternal} City }.")
    'the {Eternal} City'
    >>> extract_boxed(r"\boxed{Rome} and \boxed{never closed") # the last balanced one
    'Rome'
    >>> extract_boxed("Rome") is None
    True
    """
    # One pass: every "{" is pushed with the place where its box starts (None for a plain brace),
    # every "}" pops one. Of boxes inside boxes the outermost counts, as it closes last.
    answer, stack = None, []
    for token in re.finditer(r"\\boxed\s*\{|[{}]", text):
        if token.group() == "{":
            stack.append(None)
        elif token.group() != "}":
            stack.append(token.end())
        elif stack:
            start = stack.pop()
            if start is not None:
                answer = text[start : token.start()].strip()
    return answer


def normalize_answer(text):
    """SQuAD's normal form: lower case, no punctuation, no articles, single blanks.

    >>> normalize_answer("The  Beatles' (first) album!")
    'beatles first album'
    """
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def _comparable(text):
    """The normal form, or the bare text where nothing would be left of it ('The The', '!!!').

    >>> _comparable("The The"), _comparable(" !!! ")
    ('the the', '!!!')
    """
    return normalize_answer(text) or " ".join(text.lower().split())


# what stands in the way of comparing mathematics: pattern, what it becomes; in this order
_LATEX = [
    (r"\\[!,;: ]|\\left\b|\\right\b", ""),  # spacing and sizes
    (r"\\?[$%]|\^\{?\\circ\}?", ""),  # dollars, percents, degrees
    (r"\\(?:text|mbox)\{ [^{}]*\}\s*$", ""),  # a unit at the end
    (r"\\(?:text|mbox|mathrm|textbf)\{([^{}]*)\}", r"\1"),
    (r"\\[td]frac", r"\\frac"),
    (r"(?<![\d.])\.(?=\d)", "0."),  # .5
    (r"^\s*\w{1,2}\s*=", ""),  # x = 5
    (r"\s+", ""),
    (r"\\sqrt(\w)", r"\\sqrt{\1}"),
    (r"\\frac(\d)(\d)", r"\\frac{\1}{\2}"),
    (r"^(-?\d+)/(\d+)$", r"\\frac{\1}{\2}"),
]


def math_form(text):
    r"""MATH's kind of normal form: lower case, no blanks at all, one way to write LaTeX. Articles
    and punctuation stay.

    >>> math_form("New  York"), math_form("The Nile."), math_form(r"x = \dfrac12")
    ('newyork', 'thenile.', '\\frac{1}{2}')
    """
    text = text.lower()
    for pattern, plain in _LATEX:
        text = re.sub(pattern, plain, text)
    return text


def _best(score, prediction, golds, form=_comparable):
    """The best score over the golds; 0 for no prediction, a blank one, or no golds."""
    prediction = form(prediction or "")
    golds = [golds] if isinstance(golds, str) else golds
    golds = [gold for gold in map(form, golds) if gold]
    if not prediction or not golds:
        return 0.0
    return max(float(score(prediction, gold)) for gold in golds)


MATCHES = {"squad": _comparable, "math": math_form}  # forms in which equal answers are equal


def exact_match(prediction, golds, match="squad"):
    """1.0 where the prediction equals any gold in normal form (EM of eq. 1 and 2).

    >>> exact_match("the Eiffel Tower", ["Eiffel tower."]), exact_match("Eiffel", ["Eiffel tower"])
    (1.0, 0.0)
    >>> exact_match(None, ["x"]), exact_match("", ["the"]), exact_match("The The", ["the the"])
    (0.0, 0.0, 1.0)
    """
    return _best(lambda answer, gold: answer == gold, prediction, golds, MATCHES[match])


def sub_exact_match(prediction, golds):
    """1.0 where any gold stands inside the prediction (as whole words).

    >>> sub_exact_match("It was Rome, Italy", ["Rome"]), sub_exact_match("Romeo", ["Rome"])
    (1.0, 0.0)
    """
    return _best(lambda answer, gold: f" {gold} " in f" {answer} ", prediction, golds)


def memagent_sub_em(prediction, golds):
    """MemAgent's sub_em, two-directional and by characters: gold in answer, or answer in gold.

    For its tables only.

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
    """
    answers = [answer.strip() or None for answer in (text or "").split(";")[:n]]
    return answers + [None] * (n - len(answers))


def boxed_answer(text, match="squad"):
    r"""The answer that a response is rewarded for: its last box; "math" looks for it in the last
    300 characters.

    >>> text = r"\boxed{Rome}" + 300 * "."
    >>> boxed_answer(text), boxed_answer(text, "math")
    ('Rome', None)
    """
    return extract_boxed(text[-300:] if match == "math" else text)


def answer_reward(answer, golds, match="squad"):
    """What an answer earns, in all tasks: R_I of a recall (eq. 1), the first part of R_E (eq. 2), a
    question's reward in post-training. match: "math" compares as the released code does.

    Another reward goes here, and here only: what is reported stays exact match.

    >>> answer_reward("the Nile", ["Nile"]), answer_reward("the Nile", ["Nile"], "math")
    (1.0, 0.0)
    >>> answer_reward("New York", ["NewYork"]), answer_reward("New York", ["NewYork"], "math")
    (0.0, 1.0)
    """
    return exact_match(answer, golds, match)


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

    print("doctests:", doctest.testmod())
    for text in [r"It is \boxed{Marie Curie}.", "no box", r"\boxed{the \{Curie\} family}"]:
        answer = extract_boxed(text)
        print(f"{text!r}: answer {answer!r}, EM {exact_match(answer, ['Marie Curie'])}")
    reward = end_to_end_reward(1.0, [1.0] * 6 + [0.0] * 2)
    print("R_E of a right answer whose memory passed 6 of 8 recalls:", reward)
