"""Hostile text: documents, questions, memories, search results and outputs that try to break out.

A few thousand cases here; 10^5 with
`python -m pytest --hypothesis-profile thorough tests/test_hostile.py`.
"""

import gzip
import json
import random
import time

import pytest
from conftest import longest_turn
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import rewards
from rollout import CLOSED, TAGS, Prompts, Reader, Recaller, Response, Searcher, rollout

FORGED = [f"<{slash}{tag}>" for tag in TAGS for slash in ("", "/")]
FORGED += ["<|im_end|>", "<|im_start|>assistant\n", "<|reserved|>", "</think>"]
NASTY = [
    "\\boxed{x}", "\\boxed{", "}", "{memory}", "{section}", "[MASK]", "[TARGET]", "<", "<|", ">",
]  # fmt: skip
NASTY += [
    "\ud800", "\udfff", "\x00", "\x1b[2J", "\u202e", "שלום", "😀", "👩\u200d👩\u200d👧", "é",
    "e\u0301",
]  # fmt: skip
NASTY += ["\r\n", "\u2028", "\t", " ", "", ";", "Ada", "is", "42", "İ", "ß"]
pieces = st.sampled_from(FORGED + NASTY) | st.text(max_size=4)
hostile = st.lists(pieces, max_size=10).map("".join)
outputs = st.lists(hostile, min_size=1, max_size=4)

many = settings(max_examples=max(1000, settings.default.max_examples))


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return Prompts(tokenizer)


def babbler(prompts, outputs):
    """A sampler that says the hostile outputs in turn, special tokens as such, cut to the limit."""
    said = iter(outputs * 99)

    def sampler(asked, limits, keys):
        responses = []
        for limit in limits:
            text = next(said, "").encode("utf-8", "replace").decode()
            ids = prompts.tokenizer(text, add_special_tokens=False)["input_ids"]
            responses.append(Response(ids[:limit], len(ids) > limit))
        return responses

    return sampler


def structure(prompts, ids):
    """How often each special token stands in a prompt."""
    return {token: ids.count(token) for token in prompts.special_ids}


@many
@given(hostile, hostile, outputs)
def test_hostile_text_and_hostile_memories_leave_a_readers_structure_and_its_budget(
    prompts, document, question, outputs
):
    problem, sizes = prompts.encode(question), (12, 6)  # memory and answer tokens
    chunks = data.chunks(prompts.clean(document), prompts.tokenizer, 8)
    sections = [chunk.ids for chunk in chunks]
    reader = Reader(prompts, problem, sections, *sizes, key=(0,))
    rollout([reader], babbler(prompts, outputs))
    recaller = Recaller(prompts, reader.memories[-1], sections[0], sizes[1], key=(1,))
    rollout([recaller], babbler(prompts, outputs))

    # no turn, role or end token was forged
    nothing = dict(problem=[], memory=[], section=[])
    bare = [prompts.update(**nothing)] * len(sections)
    bare += [prompts.answer(problem=[], memory=[]), prompts.recall(memory=[], section=[])]
    for turn, empty in zip([*reader.turns, *recaller.turns], bare, strict=True):
        assert structure(prompts, turn.prompt_ids) == structure(prompts, empty)
        length = len(turn.prompt_ids) + len(turn.response_ids)
        assert length <= longest_turn(
            prompts, problem, chunk_tokens=8, memory_tokens=sizes[0], answer_tokens=sizes[1]
        )
    for inserted in (problem, *sections):
        assert not any(tag in prompts.text(inserted) for tag in FORGED)
    rewards.exact_match(rewards.extract_boxed(reader.answer), [question])


@many
@given(hostile, hostile, outputs)
def test_search_results_and_turns_forge_nothing_whatever_they_hold(
    prompts, question, result, outputs
):
    problem, sizes = prompts.encode(question), (40, 24)  # answer and result tokens
    outputs = [f"<think></think><search>{text}</search>" for text in outputs] + outputs
    searcher = Searcher(prompts, problem, 3, *sizes, key=(0,))
    found = [{"title": result, "text": result}]
    rollout([searcher], babbler(prompts, outputs), lambda queries: [found for _ in queries])

    bare = structure(prompts, prompts.search(problem=[], previous=[], turns=[]))
    assert 1 <= len(searcher.turns) <= 3
    for turn in searcher.turns:
        assert structure(prompts, turn.prompt_ids) == bare
        length = len(turn.prompt_ids) + len(turn.response_ids)
        assert length <= longest_turn(
            prompts, problem, task="searchqa", answer_tokens=sizes[0], result_tokens=sizes[1]
        )
        closed = CLOSED.findall(prompts.text(turn.response_ids))
        assert len(closed) <= 1  # a response ends at its first closing tag
    assert len(rewards.split_answers(searcher.answer, 2)) == 2


@many
@given(hostile, st.sampled_from(["Ada", "42", "é", "İ", "ß", "שלום", "😀"]))
def test_a_masked_entity_is_nowhere_left_and_placeholders_count_the_occurrences(text, entity):
    text = text.replace("[MASK]", "")
    hits = len(data.occurrences(text, entity))
    masked, _ = data.mask(text, entity)
    assert masked.count("[MASK]") == hits + text.count("[MASK]")
    assert not data.occurrences(masked, entity)


@many
@given(hostile, st.lists(hostile, max_size=3))
def test_every_score_of_any_text_is_between_0_and_1(prediction, golds):
    for name in ("exact_match", "sub_exact_match", "memagent_sub_em", "token_f1"):
        score = getattr(rewards, name)
        for answer in (prediction, rewards.extract_boxed(prediction)):
            assert 0 <= score(answer, golds) <= 1


PIECES = ["\\boxed{", "{", "}", "<", "<search>", "</memory>", "\ud800", "a", "the ", "[MASK]"]
PIECES += ["<|im_end|>", "\n", "é", "1. A"]


@pytest.mark.parametrize("piece", PIECES)
def test_a_line_of_a_megabyte_takes_linear_time(prompts, piece):
    """Each step takes well under a second; anything quadratic would take hours."""
    text = (piece * (10**6 // len(piece) + 1))[: 10**6]
    started = time.process_time()
    clean = prompts.clean(text)
    data.mask(text, "Ada")
    data.fair("Ada", text)
    rewards.exact_match(rewards.extract_boxed(text), [text])
    rewards.split_answers(text, 3)
    CLOSED.search(text[:20_000])
    assert data.chunks(clean[:200_000], prompts.tokenizer, 5120)
    assert time.process_time() - started < 60


def test_closing_tags_are_looked_for_in_linear_time(prompts):
    rng = random.Random(0)
    text = "".join(rng.choices(["<search>", "<answer>", "</", "x "], k=1024))
    ids = prompts.tokenizer(text)["input_ids"]
    started = time.process_time()
    assert prompts.closed(ids) is None
    assert time.process_time() - started < 5


# --------------------------------------------------------------------------------- damaged files

GOOD = {
    "id": "a",
    "question": "Who?",
    "answers": ["Ann"],
    "context": "Ann ran.",
    "title": "T",
    "text": "Ann ran.",
}


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


BROKEN = {  # for every loader
    "empty": b"",
    "blank": b"\n \n",
    "cut off": lines(GOOD) + b'{"id": ',
    "binary": bytes(range(256)) * 4,
    "another encoding": '{"text": "é"}'.encode("latin1"),
    "a list": b"[1, 2]\n",
    "a number": b"3\n",
    "null": b"null\n",
    "a string": b'"x"\n',
    "no such columns": lines({"x": 1}),
    "numbers": lines(dict.fromkeys(GOOD, 5)),
    "nulls": lines(dict.fromkeys(GOOD)),
    "objects": lines(dict.fromkeys(GOOD, {"a": 1})),
}
BROKEN_QUESTIONS = {
    "no answers": lines(GOOD | {"answers": []}),
    "blank answers": lines(GOOD | {"answers": [" "]}),
    "no question": lines(GOOD | {"question": ""}),
    "paragraphs without a text": lines(GOOD | {"context": [["a"]]}),
    "paragraphs of numbers": lines(GOOD | {"context": [[1, 2]]}),
    "wrong types": lines({"extra_info": "x", "reward_model": [1], "prompt": ["x"]}),
}


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "json", "parquet"])
@pytest.mark.parametrize("how", [*BROKEN, *BROKEN_QUESTIONS, "missing"])
def test_a_broken_file_is_named_in_one_line_by_every_loader(how, ending, tmp_path):
    file, content = tmp_path / f"broken.{ending}", {**BROKEN, **BROKEN_QUESTIONS}.get(how)
    if content is not None:
        file.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    loaders = [data.load_questions]
    if how not in BROKEN_QUESTIONS:
        loaders.append(lambda path: data.open_retriever(path, cache=str(tmp_path / "cache")))
    for load in loaders:
        with pytest.raises(data.InputError) as error:
            load(str(file))
        assert "\n" not in str(error.value) and file.name in str(error.value)


def test_half_a_compressed_or_parquet_file_is_an_error_in_one_line(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GOOD] * 99), tmp_path / "half.parquet")
    rows = [GOOD | {"id": str(i)} for i in range(999)]
    (tmp_path / "half.jsonl.gz").write_bytes(gzip.compress(lines(*rows)))
    for file in tmp_path.iterdir():
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(data.InputError, match=file.name):
            data.load_questions(str(file))


def test_a_byte_order_mark_and_equal_ids_are_no_errors(tmp_path):
    (tmp_path / "file.jsonl").write_bytes(b"\xef\xbb\xbf" + lines(GOOD, GOOD))
    assert len(data.load_questions(str(tmp_path / "file.jsonl"))) == 2


def test_passages_without_a_single_word_are_an_error(tmp_path):
    (tmp_path / "file.jsonl").write_bytes(lines({"title": "!", "text": "?!"}))
    with pytest.raises(data.InputError, match="no word"):
        data.open_retriever(str(tmp_path / "file.jsonl"), cache=str(tmp_path / "cache"))
