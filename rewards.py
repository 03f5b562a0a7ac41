"""Answers and rewards: what counts as right, and what a trajectory earns for it.

Every function is total (any string goes in, nothing raises), linear in the length of its input and
needs the standard library alone: copy this file as it is.

    python rewards.py            runs the examples below and prints a few rewards

Differences from the neighbours:
  1. A gold or an answer that normalises to nothing is compared as it stands. Under the plain
     SQuAD rule "" would equal "the", and in MemAgent's two-directional match an empty answer
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


def answer_reward(answer, golds):
    """What an answer earns, in all tasks: R_I of a recall (eq. 1), the first part of R_E (eq. 2), a
    question's reward in post-training.

    Another reward goes here, and here only: what is reported stays exact match.

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

    print("doctests:", doctest.testmod())
    for text in [r"It is \boxed{Marie Curie}.", "no box", r"\boxed{the \{Curie\} family}"]:
        answer = extract_boxed(text)
        print(f"{text!r}: answer {answer!r}, EM {exact_match(answer, ['Marie Curie'])}")
    reward = end_to_end_reward(1.0, [1.0] * 6 + [0.0] * 2)
    print("R_E of a right answer whose memory passed 6 of 8 recalls:", reward)
