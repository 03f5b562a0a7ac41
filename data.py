"""Data: from a corpus to masked documents, from questions to long ones, from passages to a search.

    python data.py build --corpus wikimedia/wikipedia:20231101.en --out DIR --documents 30000
    python data.py build --corpus FILE.jsonl.gz --out DIR --documents 64 --ner rules
    python data.py show DIR --tokenizer Qwen/Qwen3-4B-Instruct-2507
    python data.py longqa --questions hotpotqa.jsonl.gz --documents 200 --out FILE.jsonl

`build` makes MemTrain's documents (--ner rules: without a trained spaCy pipeline), `show` prints
one as the agent sees it, `longqa` makes MemAgent's long-text QA. A corpus, a set of questions and a
search corpus alike are a file (.jsonl, .json, .txt, each also .gz, or .parquet), a folder of them,
a data set of the Hub, OWNER/NAME[:CONFIG[:SPLIT]], or one file of it, OWNER/NAME:FILE.parquet.

Where the paper (section 3.2) is silent, or this differs:
  1. Articles are cut at sentence ends into passages of about 160 words, so that 150 make its
     24k-40k tokens. A text of up to twice as many words is taken as it is.
  2. Answers are fair: no stop word, bare number below 100, "1950s or 1960s", words in small letters
     or start of a sentence, and no "Murray River" beside "Murray". Targets follow the same rules.
  3. Every whole-word occurrence in the very same letters is masked: of "Mark" neither "mark" nor
     "Marks"; in scripts without blanks between words, or with particles joined to them, every one.
     Texts are first brought to Unicode NFC and single blanks: one spelling for a name.
  4. An article's passages are pivots of training documents or of held-out ones, never of both.
  5. Document i is a function of the corpus, the seed and i: more documents leave it as it is.

A span is [start, end) in characters of its text; a row is the number of a passage in `texts`.
The file imports none of its siblings: copy it as it is. What a function needs (spaCy 3.8, bm25s
0.3, datasets 5, transformers 5.17 to 5.23) is imported there.
"""

import argparse
import bisect
import contextlib
import functools
import glob
import gzip
import hashlib
import http.client
import json
import math
import multiprocessing
import os
import random
import re
import sys
import tempfile
import time
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

MASK = "[MASK]"  # hides the answer of a document (end-to-end task)
TARGET = "[TARGET]"  # hides an entity of a chunk (recall): another name keeps the two tasks apart


class InputError(ValueError):
    """Bad input, in one line: what is wrong, where, what to do. The command line exits with 2."""


@contextlib.contextmanager
def explained(message, *errors):
    """Turn these errors of a library into an InputError: the message, and their own words."""
    try:
        yield
    except errors as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{message} ({reason:.200})") from None


# ---- Masked documents (section 3.2) --------------------------------------------------------------


# Scripts that write no blanks between words, and those that join particles to them
NO_BLANKS = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u0f00-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"  # Tibetan, Myanmar
    "\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\ua980-\ua9df\uaa80-\uaadf"  # Khmer, Tai, Javanese
    "\u3005-\u3007\u3040-\u312f\u31a0-\u31ff\uff66-\uff9f\U0001b000-\U0001b16f"  # Japanese
    "\u3400-\u4dbf\u4e00-\ua4cf\uf900-\ufaff\U00020000-\U000323af"  # Chinese, Yi
)
PARTICLES = (
    "\u1100-\u11ff\u3130-\u318f\ua960-\ua97f\uac00-\ud7ff\uffa0-\uffdc"  # Korean
    "\u0590-\u06ff\u0750-\u077f\u0870-\u08ff\ufb1d-\ufdff\ufe70-\ufeff"  # Hebrew, Arabic
)
JOINING = rf"(?!\d)[{NO_BLANKS}{PARTICLES}]"


def occurrences(text, entity):
    """Where entity stands in text as a whole word: its starts. A line break may stand for a blank.

    Beside a character of a script that writes no blanks, or that joins particles to words, a word
    ends anywhere: there an occurrence is one of characters.

    >>> occurrences("Rome, Romeo and new\\nRome; Rome_2", "Rome")
    [0, 20]
    >>> occurrences("in New\\nYork", "New York"), occurrences("在北京的天安门", "北京")
    ([3], [1])
    """
    text = text.replace("\n", " ")
    starts, position = [], 0
    while (start := text.find(entity, position)) >= 0:
        end = start + len(entity)
        before, after = text[start - 1 : start], text[end : end + 1]
        if _joined(before, entity[0]) or _joined(after, entity[-1]):
            position = start + 1
        else:
            starts.append(start)
            position = end
    return starts


def _joined(neighbour, edge):
    """Whether a neighbour, "" for none, makes a longer word of the entity with this edge."""
    if not neighbour or re.match(JOINING, neighbour) or re.match(JOINING, edge):
        return False
    # category M: accents and vowel signs that follow a letter
    is_mark = unicodedata.category(neighbour)[0] == "M"
    return neighbour.isalnum() or neighbour == "_" or is_mark


def mask(text, entity, spans=(), placeholder=MASK):
    """Put the placeholder for every occurrence of entity: (text, spans).

    The spans are moved along; those that an occurrence touches are dropped.

    >>> mask("Rome: a Roman left Rome for Ostia.", "Rome", [(0, 4), (8, 13), (19, 23), (28, 33)])
    ('[MASK]: a Roman left [MASK] for Ostia.', [[10, 15], [32, 37]])
    """
    starts = occurrences(text, entity)
    ends = [start + len(entity) for start in starts]
    between = [text[end:start] for end, start in zip([0, *ends], [*starts, len(text)])]

    longer = len(placeholder) - len(entity)
    moved = []
    for start, end in spans:
        before = bisect.bisect_right(ends, start)  # occurrences that end before the span starts
        if bisect.bisect_left(starts, end) == before:  # all the others start after its end
            moved.append([start + before * longer, end + before * longer])
    masked = placeholder.join(between)

    # of "a+a+" the second "a+" hides the first: now that stands alone as well
    if occurrences(masked, entity) and not occurrences(placeholder, entity):
        return mask(masked, entity, moved, placeholder)
    return masked, moved


class Corpus(NamedTuple):
    texts: list[str]
    entities: list[list[tuple[int, int]]]  # spans of each text
    related: Callable  # row -> the rows most related to it, best first


def assemble(corpus, pivot, args, rng):
    """A masked document around the passage in row `pivot`; the answer is one of its entities.

    It has 1 + args.related + args.random passages; fewer related ones are made up for by random
    ones.
    """
    # every passage once, in random order
    total = 1 + args.related + args.random
    random_rows = rng.sample(range(len(corpus.texts)), total)
    rows = list(dict.fromkeys([pivot, *corpus.related(pivot), *random_rows]))[:total]
    rng.shuffle(rows)

    # one text, blank lines between; a passage's entities move by where it starts
    passages = [corpus.texts[row] for row in rows]
    spans, offset = [], 0
    for row in rows:
        spans += [(offset + start, offset + end) for start, end in corpus.entities[row]]
        offset += len(corpus.texts[row]) + len("\n\n")

    # all occurrences of the answer are masked
    names = sorted({corpus.texts[pivot][start:end] for start, end in corpus.entities[pivot]})
    answer = rng.choice(names)
    text, spans = mask("\n\n".join(passages), answer, spans)
    assert not occurrences(text, answer), f"{answer!r} is still in the document"
    return {"text": text, "answer": answer, "entities": spans}


def draw_documents(corpus, pivots, args, split, count):
    """Yield `count` documents around random pivots that have an entity."""
    from tqdm import tqdm

    if count and not any(corpus.entities[row] for row in pivots):
        cure = "use a larger corpus or another --ner; is it the right language?"
        raise InputError(f"no passage for {split} documents has an entity; {cure}")
    for number in tqdm(range(count), desc=f"build {split}", unit=" documents"):
        rng = random.Random(f"{args.seed}/{split}/{number}")
        pivot = rng.choice(pivots)
        while not corpus.entities[pivot]:
            pivot = rng.choice(pivots)
        yield {"id": f"{split}-{number:06d}", **assemble(corpus, pivot, args, rng)}


def split_pivots(articles, seed):
    """The rows that may be pivots, {"train": rows, "heldout": rows}: articles are never divided."""
    # a tenth is held out, even if nothing is built of it: the training documents stay the same
    pivots = {"train": [], "heldout": []}
    for row, article in enumerate(articles):
        number = zlib.crc32(f"{seed}/{article}".encode())
        pivots["train" if number % 10 else "heldout"].append(row)
    return pivots


# ---- Chunks, and the recall task (section 3.3) ---------------------------------------------------


class Chunk(NamedTuple):
    ids: list[int]
    start: int  # its characters are text[start:end]; chunk by chunk they make up the whole text
    end: int


def chunks(text, tokenizer, chunk_tokens):
    """Cut the text by tokens: every chunk but the last has exactly chunk_tokens.

    The ids are those of tokenizer(text). "" is one empty chunk. The tokenizer must be a fast one.
    """
    options = dict(add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    encoded = tokenizer(text, **options)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    found, start = [], 0
    for first in range(0, max(1, len(ids)), chunk_tokens):
        last = first + chunk_tokens
        # A character of several tokens belongs to the chunk of its first one, characters of no
        # token at the end to the last chunk.
        end = max(start, offsets[last - 1][1]) if last < len(ids) else len(text)
        found.append(Chunk(ids[first:last], start, end))
        start = end
    return found


class Recall(NamedTuple):
    k: int  # the memory after turn k ..
    l: int  # .. is asked for an entity of chunk l; both count from 1
    ids: list[int]  # chunk l with the entity hidden
    target: str


def draw_recall(document, chunks, tokenizer, chunk_tokens, rng):
    """Draw k and l, and an entity wholly inside chunk l; None where no chunk has one.

    k is uniform in 2..T, l in 1..k-1: the chunk was read before turn k, and chunk T is never asked
    for. A single chunk: k = l = 1. If chunk l has no entity, others are tried in random order,
    first those that go with k. The entity becomes [TARGET] and the chunk is encoded again; tokens
    that are now too many go from the end farther from the target.
    """
    # k, and the chunks in the order in which they are tried
    count = len(chunks)
    if count == 1:
        k, order = 1, [1]
    else:
        k = rng.randint(2, count)
        order = rng.sample(range(1, k), k - 1) + rng.sample(range(k, count), count - k)

    # the first chunk that wholly holds an entity other than the answer
    text = document["text"]
    for l in order:
        _, start, end = chunks[l - 1]
        inside = [text[a:b] for a, b in document["entities"] if start <= a and b <= end]
        names = sorted({name for name in inside if name != document["answer"] and MASK not in name})
        if names:
            target = rng.choice(names)
            ids = _hide(target, text[start:end], tokenizer, chunk_tokens)
            if k <= l < count:  # read too late for memory k: a later one is asked
                k = rng.randint(l + 1, count)
            return Recall(k, l, ids, target)
    return None


def _hide(target, text, tokenizer, chunk_tokens):
    masked, _ = mask(text, target, placeholder=TARGET)
    ids = tokenizer(masked, add_special_tokens=False, verbose=False)["input_ids"]
    before = masked.find(TARGET)
    after = len(masked) - masked.rfind(TARGET) - len(TARGET)
    return ids[-chunk_tokens:] if before > after else ids[:chunk_tokens]


# ---- A folder of documents: build, save, load, show ----------------------------------------------


def build(args):
    """Write a folder of masked documents to args.out: `save_documents` says what it holds."""
    # read, index and tag the corpus
    read_rows(args.corpus)  # what is not there, or not installed, is said before hours of reading
    open_ner(args.ner)
    texts, articles = read_corpus(args.corpus, args.passage_words, args.max_passages, args.seed)
    total = 1 + args.related + args.random
    if len(texts) < total:
        raise InputError(f"{args.corpus}: {len(texts)} passages, a document needs {total}")
    heldout = min(128, (args.documents + 9) // 10) if args.heldout < 0 else args.heldout
    pivots = split_pivots(articles, args.seed)
    counts = {"train": args.documents, "heldout": heldout}
    for split, count in counts.items():
        if count and not pivots[split]:
            few = f"a tenth of {len(set(articles))} articles is held out, and {split} has none"
            raise InputError(f"{args.corpus}: {few}; use more, another --seed or --heldout 0")
    search = open_index(texts, args.encoder)
    entities = find_entities(texts, args.ner, args.processes)

    def related(row):
        (hits,) = search([texts[row]], args.related + 1)
        return [other for other, _ in hits if other != row][: args.related]

    # draw and write the documents
    started = time.time()
    corpus, parts = Corpus(texts, entities, related), {}
    for split, count in counts.items():
        parts[split] = draw_documents(corpus, pivots[split], args, split, count)
    save_documents(args.out, parts)
    rate = sum(counts.values()) / (time.time() - started)

    # say what they are like
    words, inside = [], 0
    for split in counts:
        for document in load_documents(args.out, split).select_columns(["text", "answer"]):
            words.append(word_count(document["text"]))
            inside += document["answer"] in document["text"]
    size = f"{total} passages, {min(words)} to {max(words)} words"
    print(f"{args.out}: {args.documents} train and {heldout} heldout documents of {size}")
    print(f"{inside} of the answers still stand inside other words; {rate:.1f} documents/s")


def save_documents(out, parts):
    """Write the folder that load_documents reads: parts = {"train": documents, "heldout": ..}.

    A document is {"id", "text", "answer", "entities": [[start, end], ..]} and may bring its own
    "question"; without one, or with None, it is asked the paper's. They may come from iterators and
    are written one by one, in constant memory: 30,000 of them are 5 GB.
    """
    import datasets
    from datasets.arrow_writer import ArrowWriter

    if os.path.exists(out):
        raise InputError(f"{out}: is there already; choose another name")
    datasets.disable_progress_bars()
    string = datasets.Value("string")
    spans = datasets.List(datasets.List(datasets.Value("int32")))
    features = datasets.Features(
        {"id": string, "text": string, "answer": string, "entities": spans, "question": string}
    )
    saved = datasets.DatasetDict()
    with whole_or_nothing(out) as unfinished:
        for split, documents in parts.items():
            file = f"{unfinished}.{split}"
            with ArrowWriter(path=file, features=features, writer_batch_size=64) as writer:
                for document in documents:
                    writer.write({"question": None, **document})
                writer.finalize()
            saved[split] = datasets.Dataset.from_file(file)
        # without the number of shards an empty part is saved in a form that can't be loaded
        shards = {split: 1 + len(rows) // 2000 for split, rows in saved.items()}
        saved.save_to_disk(unfinished, num_shards=shards)


def holds_documents(path):
    """Whether save_documents wrote this folder."""
    return os.path.exists(f"{path}/dataset_dict.json")


def load_documents(path, split):
    """What save_documents wrote as "train" or "heldout": a datasets.Dataset."""
    import datasets

    if not holds_documents(path):
        raise InputError(f"{path}: no documents here; make them with: python data.py build")
    parts = datasets.load_from_disk(str(path))
    if split not in parts:
        raise InputError(f"{path}: no split {split!r}, there are {', '.join(parts)}")
    return parts[split]


def show(args):
    """Print a document and its answer; with --tokenizer chunk by chunk, and a recall."""
    documents = load_documents(args.dir, args.split)
    if args.document >= len(documents):
        raise InputError(f"--document {args.document}: {args.split} has {len(documents)} documents")
    document = documents[args.document]
    text = document["text"]
    print(f"document {document['id']}: {len(text.split())} words, {text.count(MASK)} masks")
    if document.get("question"):
        print(f"---- question: {document['question']}")

    if args.tokenizer:
        import transformers

        with explained(f"--tokenizer {args.tokenizer}: can't be loaded", OSError, ValueError):
            tokenizer = transformers.AutoTokenizer.from_pretrained(args.tokenizer)
        parts = chunks(text, tokenizer, args.chunk_tokens)
        for number, part in enumerate(parts, 1):
            print(f"\n---- chunk {number} of {len(parts)} ({len(part.ids)} tokens) ----")
            print(text[part.start : part.end].strip())
        if recall := draw_recall(document, parts, tokenizer, args.chunk_tokens, random.Random(0)):
            asked = f"after turn {recall.k}, {TARGET} in chunk {recall.l}"
            print(f"\n---- a recall: {asked} is {recall.target!r}")
    else:
        print(f"\n{text}")
    print(f"\n---- answer: {MASK} is {document['answer']!r}")


# ==== black boxes: called above by plain names ====================================================


# ---- Reading: the rows of any source, the passages of any corpus ---------------------------------

ROW_FILE = r"\.(jsonl|json|parquet|txt)(\.gz)?$"
NO_DATA = r"(?i)(^|/)(\.|readme|licen[cs]e)|\.md$"  # may lie in a folder: hidden files and these


def read_rows(source, columns=None, stream=False, seed=0):
    """(where, row) of all rows: every row as a dict, and where it stands, for messages.

    A folder is its files, also those of its folders, in sorted order, each read as by itself.
    columns: of parquet only these are read ("a.b" is a field of a struct): MemAgent's files hold
    nested columns that Arrow can't read from large row groups. stream: a data set of the Hub is
    shuffled with the seed and streamed, not downloaded whole. InputError for what can't be read;
    for a file or folder that is not there at once, before the first row is asked for.
    """
    kind = re.search(ROW_FILE, source)
    repo, _, file = source.partition(":")
    on_hub = repo.count("/") == 1 and not os.path.exists(source)
    if os.path.isdir(source):
        rows = _folder_rows(source, columns)
    elif on_hub and not kind:
        rows = _hub_rows(source, stream, seed)
    elif on_hub and file:
        rows = read_rows(_hub_file(repo, file), columns)
    elif not os.path.exists(source):
        raise InputError(f"{source}: no such file (on the Hub: OWNER/NAME[:CONFIG[:SPLIT]])")
    elif not kind:
        known = ".jsonl, .json, .txt, each also .gz, and .parquet"
        raise InputError(f"{source}: unknown kind of file; known are {known}")
    elif kind[1] == "parquet":
        rows = _parquet_rows(source, columns)
    else:
        rows = _file_rows(source, kind[1])

    return map(_checked_row, rows)


def _checked_row(found):
    where, row = found
    if not isinstance(row, dict):
        raise InputError(f"{where}: a row must be a JSON object, not a {type(row).__name__}")
    return found


def _folder_rows(folder, columns):
    files, others = [], []
    for name in sorted(glob.glob("**", root_dir=folder, recursive=True, include_hidden=True)):
        if os.path.isfile(os.path.join(folder, name)):
            (others if re.search(NO_DATA, name) else files).append(name)
    if not files:
        raise InputError(f"{folder}: no data in this folder")
    say(f"{folder}: reads {len(files)} files; leaves out {', '.join(others) or 'none':.200}")
    for name in files:
        yield from read_rows(os.path.join(folder, name), columns)


def say(message):
    """On stderr, once: of the processes that torchrun starts the first one says it."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)


def open_text(path, mode, encoding="utf-8"):
    return (gzip.open if path.endswith(".gz") else open)(path, mode, encoding=encoding)


def _lines(path):
    errors = OSError, EOFError, zlib.error, UnicodeDecodeError
    unreadable = explained(f"{path}: can't be read as UTF-8; convert it or fetch it again", *errors)
    # sig: there may be a byte order mark
    with unreadable, open_text(path, "rt", "utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if "\0" in line:
                raise InputError(f"{path}:{number}: a NUL, which no text has; repair the file")
            yield line


def _file_rows(path, kind):
    """A .jsonl has a row in each line, a .json is a list of rows, a .txt is one row."""
    if kind == "jsonl":
        for number, line in enumerate(_lines(path), 1):
            if line.strip():
                where = f"{path}:{number}"
                yield where, _parsed(where, line, "a .jsonl has a row in each line")
    elif kind == "json":
        rows = _parsed(path, "".join(_lines(path)), "a file with one row per line is called .jsonl")
        if not isinstance(rows, list):
            raise InputError(f"{path}: a JSON list of rows is wanted, not a {type(rows).__name__}")
        for number, row in enumerate(rows, 1):
            yield f"{path}: row {number}", row
    else:
        # hard line breaks are joined: paragraphs end at an empty line
        text = "\n".join(line.strip() for line in _lines(path))
        yield path, {"text": re.sub(r"(?<!\n)\n(?!\n)", " ", text)}


def _parsed(where, text, cure):
    """The value of a JSON text."""

    def unique(pairs):
        value = dict(pairs)
        if len(value) < len(pairs):  # which of the two values is meant?
            raise ValueError(f"a key stands twice, of {[key for key, _ in pairs]}")
        return value

    # ValueError: also an integer of thousands of digits; RecursionError: of nested lists
    with explained(f"{where}: not JSON; {cure}", ValueError, RecursionError):
        return json.loads(text, object_pairs_hook=unique)


def _parquet_rows(path, columns):
    import pyarrow
    import pyarrow.parquet

    number = 0
    unreadable = f"{path}: can't be read as parquet; fetch the file again"
    with explained(unreadable, pyarrow.ArrowException, OSError):
        file = pyarrow.parquet.ParquetFile(path)
        for batch in file.iter_batches(batch_size=64, columns=columns):  # a row may hold 150 kB
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row


def _hub_rows(source, stream, seed):
    import datasets

    name, config, split, *_ = *source.split(":"), None, None
    unreadable = f"{source}: neither a file nor a data set that can be loaded"
    with explained(unreadable, datasets.exceptions.DatasetsError, OSError, ValueError):
        rows = datasets.load_dataset(name, config, split=split or "train", streaming=stream)
        if stream:  # shuffled, as the first articles of Wikipedia are no sample of it
            rows = rows.shuffle(seed=seed, buffer_size=10_000)
        for number, row in enumerate(rows, 1):
            yield f"{source}: row {number}", row


def _hub_file(repo, file):
    import huggingface_hub

    errors = huggingface_hub.errors.HfHubHTTPError, OSError, ValueError
    with explained(f"{repo}:{file}: neither a file nor one that the Hub gives", *errors):
        return huggingface_hub.hf_hub_download(repo, file, repo_type="dataset")


def passage(where, row):
    """A row as {"id", "title", "text"}, from {title, text} or wiki-18's {contents}.

    >>> passage("f:1", {"id": "7", "contents": '"Rome"\\nRome is a  city.'})
    {'id': '7', 'title': 'Rome', 'text': 'Rome is a city.'}
    """
    names = "id", "title", "text", "contents"
    identity, title, text, contents = [plain(where, row.get(name)) for name in names]
    if text is None and isinstance(contents, str):
        # a quoted title, then the text; of one line the text alone
        first, line_break, text = contents.strip().partition("\n")
        title, text = (first.strip().strip('"'), text) if line_break else ("", first)
    if not isinstance(text, str):
        raise InputError(f"{where}: no text and no contents, this row has {sorted(row)}")
    title = tidy(as_text(f"{where}: title", title or "")).replace("\n", " ")
    identity = where if identity is None else as_text(f"{where}: id", identity)
    return {"id": identity, "title": title, "text": tidy(text)}


def plain(where, value):
    """The value with text for bytes, None for NaN, and whole characters only."""
    if isinstance(value, bytes):
        with explained(f"{where}: bytes that are not UTF-8", UnicodeDecodeError):
            value = value.decode()
    if isinstance(value, str):
        return re.sub("[\ud800-\udfff]", "\ufffd", value)  # halves of a character: in no file
    if isinstance(value, dict):
        return {name: plain(where, each) for name, each in value.items()}
    if isinstance(value, list):
        return [plain(where, each) for each in value]
    return None if value != value else value


def as_text(where, value):
    """A text, or a number as one; 5.0 stands for 5: a column with gaps is one of floats."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    known = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    if not known or value in (math.inf, -math.inf):
        raise InputError(f"{where}: must be a text, this is a {type(value).__name__}")
    return str(value)


def tidy(text):
    r"""Unicode NFC, single blanks, no empty lines.

    >>> tidy("Beyonce\u0301 \u00a0 sang. \n\n She left.")
    'Beyoncé sang.\nShe left.'
    """
    lines = [" ".join(line.split()) for line in unicodedata.normalize("NFC", text).splitlines()]
    return "\n".join(filter(None, lines))


# Latin, Greek, Cyrillic ..: `re` has no class for capital letters
UPPER = "".join(filter(str.isupper, map(chr, range(0x2000))))
_ABBREVIATION = rf"(?<!\b(?:Mr|Ms|Dr|St|Jr|Sr|vs|No)\.)(?<!Mrs\.)(?<!\b[{UPPER}]\.)"
_CLOSING = r"""["'”’)\]」』）]*"""
_NEXT = rf"""\s+(?=["'“‘(\[]*[{UPPER}\d])"""
SENTENCE_END = rf"\n|[.!?]{_ABBREVIATION}{_CLOSING}{_NEXT}|[。！？]{_CLOSING}\s*"


def split_article(text, words):
    """Cut text at sentence ends into pieces of about `words` words; up to twice as many stay whole.

    >>> split_article("One two. Three four. Five six. Seven eight. Nine.", 4)
    ['One two. Three four.', 'Five six. Seven eight. Nine.']
    """
    if word_count(text) <= 2 * words:
        return [text]
    ends = [match.end() for match in re.finditer(SENTENCE_END, text)] + [len(text)]
    pieces, piece, count = [], "", 0
    for start, end in zip([0, *ends], ends):
        sentence = text[start:end]
        size = word_count(sentence)
        # a piece ends where the sentence would take it farther from the wanted size
        if count and count + size - words > words - count:
            pieces.append(piece.strip())
            piece, count = "", 0
        piece += sentence
        count += size

    # a short rest goes to the piece before it
    if pieces and count < words / 2:
        piece = f"{pieces.pop()} {piece}"
    return [*pieces, piece.strip()]


def word_count(text):
    """Words between blanks; of a script that writes none, two characters are one."""
    return len(text.split()) + len(re.findall(f"[{NO_BLANKS}]", text)) // 2


def read_corpus(source, words=160, limit=0, seed=0):
    """The passages of a corpus: (texts, articles), a text being title, line break and text.

    articles: the name of the article each is from: its title, or the number of its row. limit: at
    most so many passages (0: all), the first of a file or folder, a shuffled stream of a data set
    on the Hub. Doubles, empty texts and those that hold a placeholder are left out.
    """
    from tqdm import tqdm

    article_of = {}  # text: article
    rows = read_rows(source, stream=limit > 0, seed=seed)
    for number, (where, row) in enumerate(tqdm(rows, desc="read", unit=" rows", delay=1), 1):
        found = passage(where, row)
        title = found["title"]
        for piece in split_article(found["text"], words):
            text = f"{title}\n{piece}" if title else piece
            if piece and MASK not in text and TARGET not in text:
                article_of.setdefault(text, title or str(number))
        if limit and len(article_of) >= limit:
            break
    return list(article_of)[: limit or None], list(article_of.values())[: limit or None]


# ---- Questions (sections 6 to 8) -----------------------------------------------------------------

# What is read of a row of questions, and under which names; "a.b" is the field b of a struct (these
# are veRL's, for MemAgent and MEM1). A row that fills several names of one field must say the same
# under each. What stands under other names is left alone.
FIELDS = {
    # a text or a number, the first that there is; without one, where the row stands
    "id": ("id", "_id", "question_id", "index", "extra_info.index"),
    "source": ("data_source",),  # a text; questions of one source are joined
    "question": ("question", "input", "extra_info.question"),  # a text
    "prompt": ("prompt",),  # without a question: the user's last message, as it is
    # of one question "x", 5, ["x", "y"] or {"value": "x", "aliases": ["y"]} (TriviaQA), of several
    # [["x"], ["y", "z"]]; each also as {"target": ..}, each also as JSON text
    "golds": ("answers", "golden_answers", "answer", "reward_model.ground_truth"),
    "aliases": ("answer_aliases",),  # as golds, of one question: more of them
    # a text; [[title, text or sentences], ..]; [{"title", "text" or "paragraph_text"}, ..];
    # {"title": [..], "sentences": [[..], ..]}; each also as JSON text
    "context": ("context", "paragraphs"),
    # true or false: a question without an answer is left out, and counted
    "answerable": ("answerable",),
    "impossible": ("is_impossible",),
    # these would change what is asked or what is right: choices, and RULER's lists, all of which
    # must be named. A row that fills one is refused
    "refused": (
        "choices", "options", "choice_A", "endings", "candidates", "all_classes", "outputs",
    ),
}  # fmt: skip


def load_questions(path, objectives=None, long=False):
    """Questions of any of the field's formats (see FIELDS), from a file, a folder or the Hub.

    Gives a list of {"id", "source", "question", "answers": [str, ..], "context": str}. long: every
    question needs a context. With objectives, rows of several questions each: those that a file has
    joined (MEM1's), and others as pair_questions joins them. InputError for a row that lacks
    something; what is left out is counted and said.
    """
    if path == "BytedTsinghua-SIA/hotpotqa":
        path += ":hotpotqa_train_32k.parquet"  # the rest are evaluation files of other columns
    rows = []
    for where, row in answerable_rows(path):
        rows.append(question_row(where, row, several=objectives is not None))
        if long and not rows[-1]["context"].strip():
            raise InputError(f"{where}: a long-text question needs a context or paragraphs")
    if objectives:
        rows = join_questions(path, rows, objectives)
    if not rows:
        raise InputError(f"{path}: no questions")
    return rows


def answerable_rows(path):
    """Yield (where, row) of the questions that have an answer; says how many have none."""
    left_out = 0
    for where, row in read_rows(path, sum(FIELDS.values(), ())):
        answerable = read_field(where, row, "answerable", true_or_false)
        if answerable is False or read_field(where, row, "impossible", true_or_false):
            left_out += 1
        else:
            yield where, row
    say_left_out(path, left_out, "questions, which have no answer by their own account")


def say_left_out(path, count, what):
    if count:
        say(f"{path}: left out {count} {what}")


def question_row(where, row, several=False):
    """One row of any format as a question; several: "answers" may be a list of lists.

    >>> row = {"index": 3, "input": "Who?", "answers": '["Ann"]', "context": [["A", "She did."]]}
    >>> question_row("f:1", row) == {
    ...     "id": "3", "source": "", "question": "Who?", "answers": ["Ann"],
    ...     "context": "Document 1:\\nA\\nShe did."}
    True
    """
    field = functools.partial(read_field, where, row)
    for name in FIELDS["refused"]:
        if not is_empty(row.get(name)):
            problem = "questions with choices or lists to be named are not read"
            raise InputError(f"{where}: {name}: {problem}; delete the row")
    question = field("question", read_question) or field("prompt", read_question)
    golds = field("golds", read_golds)
    if not question or not golds:
        missing = "answer" if question else "question"
        raise InputError(f"{where}: no {missing}; a row needs both, this one has {sorted(row)}")

    if aliases := field("aliases", read_golds):
        if len(golds) > 1 or len(aliases) > 1:
            raise InputError(f"{where}: answer_aliases are read of one question alone")
        golds = [list(dict.fromkeys(golds[0] + aliases[0]))]
    if several:
        check_joined(where, question, golds)
    elif len(golds) > 1:
        raise InputError(f"{where}: golds of {len(golds)} questions at once, see --task searchqa")

    context = field("context", read_context) or ""
    return {
        "id": field("id", as_text) or where,
        "source": field("source", as_text) or "",
        "question": question,
        "answers": golds if len(golds) > 1 else golds[0],
        "context": context if isinstance(context, str) else lay_out(context),
    }


def read_field(where, row, field, read):
    """What a row says in this field of FIELDS, as `read` reads it; None where it says nothing."""
    first = found = None
    for name in FIELDS[field]:
        value = row
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        value = plain(f"{where}: {name}", value)
        value = None if is_empty(value) else read(f"{where}: {name}", value)
        if is_empty(value):
            continue
        if first is None:
            first, found = name, value
        elif value != found and field != "id":
            raise InputError(f"{where}: {first} and {name} disagree; delete one of them")
    return found


def is_empty(value):
    return value in (None, [], {}) or isinstance(value, str) and not value.strip()


def true_or_false(where, value):
    if value not in (True, False):
        raise InputError(f"{where}: must be true or false, this is {value!r:.40}")
    return bool(value)


def read_question(where, value):
    """A text, or the last message of a conversation."""
    match value:
        case str(text) | [*_, {"role": "user", "content": str(text)}]:
            return text.strip()
    raise InputError(f"{where}: neither a text nor a conversation that ends with a user's")


def read_golds(where, value):
    """The golds of every question, [[gold, ..], ..], or None where there are none.

    >>> read_golds("f:1", {"target": ["x", None]}), read_golds("f:1", '[["x"], ["y", 5.0]]')
    ([['x']], [['x'], ['y', '5']])
    """
    match value := from_json(where, value):
        case {"target": target}:
            return read_golds(where, target)
        case {"value": first, "aliases": [*aliases]}:
            value = [first, *aliases]
    lists = value if isinstance(value, list) else [value]
    if not any(isinstance(own, list) for own in lists):
        lists = [lists]  # of one question

    golds = []
    for own in lists:
        if not isinstance(own or [], list):
            raise InputError(f"{where}: golds must be texts, or a list of texts for each question")
        golds.append([as_text(where, gold) for gold in own or [] if not is_empty(gold)])
    if len(golds) > 1 and [] in golds:
        raise InputError(f"{where}: no gold for question {golds.index([]) + 1} of {len(golds)}")
    return golds if golds[0] else None


def from_json(where, text):
    """The list or dict that a text writes as JSON; any other value, as "[sic]", as it is."""
    bare = text.strip() if isinstance(text, str) else ""
    if not re.fullmatch(r"(?s)\[.*\]|\{.*\}|array\(.*\)", bare):
        return text
    with contextlib.suppress(InputError):
        return plain(where, _parsed(where, bare, ""))
    # a list in other writing, as Python's or numpy's
    if re.match(r"""[\[{(\s]*['"]|\[?array\(""", bare):
        raise InputError(f"{where}: neither JSON nor a text: {bare:.80}")
    return text


def check_joined(where, question, golds):
    """Questions joined by ";" must be as many as lists of golds; a question may hold a ";"."""
    parts = len(re.findall(r"[^;]*[^;\s][^;]*", question))
    surely = len(re.findall(r"\?\s*;\s*[^;\s]", question)) + 1
    if not surely <= len(golds) <= parts:
        raise InputError(f"{where}: {surely} questions joined by ; but golds of {len(golds)}")


def lists_of_golds(row):
    """One list of golds for each question of the row."""
    return row["answers"] if isinstance(row["answers"][0], list) else [row["answers"]]


def join_questions(path, rows, objectives):
    """Rows of several questions each; says what is left out.

    Joined answers are split at ";": golds that hold one go, and questions that have no other.
    """
    kept, golds = [], 0
    for row in rows:
        lists = lists_of_golds(row)
        if objectives > 1 or len(lists) > 1:  # one question by itself keeps all
            met = [[gold for gold in own if ";" not in gold] for own in lists]
            golds += sum(map(len, lists)) - sum(map(len, met))
            lists = met
        if all(lists):
            kept.append({**row, "answers": lists})
    others = f"{len(rows) - len(kept)} rows that have no other"
    say_left_out(path, golds, f"golds that hold a ; at which answers are split, and {others}")

    joined = pair_questions(kept, objectives)
    rest = sum(len(lists_of_golds(row)) for row in kept)
    rest -= sum(len(row["answers"]) for row in joined)
    say_left_out(path, rest, f"questions, too few to be joined by {objectives}")
    return joined


def read_context(where, value):
    """A text, or the paragraphs [(title, text), ..]."""
    value = from_json(where, value)
    if isinstance(value, str):
        return value
    match value:
        case {"title": [*titles], "sentences": [*texts]} if len(titles) == len(texts):
            value = list(zip(titles, texts))

    found = []
    for paragraph in value if isinstance(value, list) else [value]:
        match paragraph:
            case {"title": title, "paragraph_text": text} | {"title": title, "text": text}:
                paragraph = title, text
        match paragraph:
            case str(title), str(text):
                found.append((title, text))
            case str(title), [*sentences] if all(isinstance(each, str) for each in sentences):
                found.append((title, join_sentences(sentences)))
            case _:
                wanted = "[title, text or sentences] or {title, text} is wanted"
                raise InputError(f"{where}: {paragraph!r:.60} is no paragraph; {wanted}")
    return found


def join_sentences(sentences):
    """HotpotQA's hold their blanks, 2WikiMultiHopQA's do not."""
    text = ""
    for sentence in filter(None, sentences):
        apart = not text or text[-1].isspace() or sentence[0].isspace()
        text += sentence if apart else f" {sentence}"
    return text


def lay_out(pairs):
    """MemAgent's layout of paragraphs [(title, text), ..]."""
    numbered = enumerate(pairs, 1)
    return "\n\n".join(f"Document {number}:\n{title}\n{text}" for number, (title, text) in numbered)


def pair_questions(rows, objectives):
    """Join consecutive questions of one source, `objectives` at a time; a rest is dropped.
    Rows that hold several questions already stay as they are.

    >>> rows = [{"id": n, "question": f"Q{n}?", "answers": [n]} for n in "abc"]
    >>> pair_questions(rows, 2)
    [{'id': 'a+b', 'source': '', 'question': 'Qa?; Qb?', 'answers': [['a'], ['b']], 'context': ''}]
    """
    joined, by_source = [], {}
    for row in rows:
        if len(lists_of_golds(row)) > 1:
            joined.append({**row, "context": ""})
        else:
            by_source.setdefault(row.get("source", ""), []).append(row)

    for source, own in by_source.items():
        for first in range(0, len(own) - objectives + 1, objectives):
            group = own[first : first + objectives]
            joined.append({
                "id": "+".join(row["id"] for row in group),
                "source": source,
                "question": "; ".join(row["question"] for row in group),
                "answers": [lists_of_golds(row)[0] for row in group],
                "context": "",
            })  # fmt: skip
    return joined


def longqa(args):
    """Write long documents: a question's own paragraphs among random others, no title twice.

    Shuffled with a seed per question. MemAgent's sit at the same positions in every sample (one
    shuffle seed); here the position says nothing.
    """
    from tqdm import tqdm

    if not args.out.endswith((".jsonl", ".jsonl.gz")):
        raise InputError(f"--out {args.out}: .jsonl or .jsonl.gz can be written")

    # the questions with their paragraphs, and the pool of all paragraphs
    rows, pool = [], {}
    for where, row in answerable_rows(args.questions):
        context = read_field(where, row, "context", read_context)
        own = {}  # {title: text}; paragraphs of one title are joined
        for title, text in context if isinstance(context, list) else ():
            own[title] = f"{own[title]}\n{text}" if title in own else text
        if len(own) > args.documents:
            raise InputError(f"{where}: {len(own)} paragraphs of its own, more than --documents")
        pool.update(own)
        rows.append((question_row(where, row), own))
    without = sum(not own for _, own in rows)
    say_left_out(args.questions, without, "questions, which have no paragraphs of their own")
    if len(pool) < args.documents:
        raise InputError(f"{args.questions}: {len(pool)} paragraphs in all, fewer than --documents")

    titles = list(pool)
    with whole_or_nothing(args.out) as unfinished, open_text(str(unfinished), "wt") as file:
        for question, own in tqdm(rows, desc="longqa", unit=" documents"):
            if not own:
                continue
            rng = random.Random(f"{args.seed}/{question['id']}")
            others = [title for title in rng.sample(titles, args.documents) if title not in own]
            chosen = [*own.items(), *((title, pool[title]) for title in others)][: args.documents]
            rng.shuffle(chosen)
            row = {**question, "context": lay_out(chosen), "num_docs": len(chosen)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    size = f"{args.documents} documents each, out of {len(pool)} paragraphs"
    print(f"{args.out}: {len(rows) - without} questions with {size}")


# ---- Entities ------------------------------------------------------------------------------------

_MONTH = "(?:January|February|March|April|May|June|July|August|September|October|November|December)"
_UNIT = (
    "%|percent|per[ ]cent|hundred|thousand|million|billion|km|kilomet(?:er|re)s?|m|met(?:er|re)s?|"
    "cm|mm|miles?|feet|ft|inches|kg|kilograms?|tonn?es?|tons?|pounds?|acres|hectares|"
    "square[ ](?:miles|kilomet(?:er|re)s)|mph|hours?|minutes|seconds|days|weeks|months|years?|"
    "people|inhabitants|dollars|euros"
)
_STARTER = (  # words that start a sentence: no name goes on behind a full stop with one
    "(?:The|An?|In|On|At|By|As|It|Its|He|His|She|Her|They|This|These|For|From|After|During|When|"
    r"While|Although|However)\b"
)
_LINK = "(?:&|of|the|de|la|le|du|des|van|von|der|den|di|da|del|della|dos|al|bin|ibn|y|och|und|et)"
_NUMBER = rf"(?:[ ]\d{{1,3}}(?![ ]{_MONTH}))?"  # Apollo 11, not "On 11 May"
_CAPITALISED = rf"""(?:
    (?:[{UPPER}]\.){{2,}}                              # U.S.
    |[{UPPER}]\.(?=[ ][{UPPER}])(?![ ]{_STARTER})      # J. R. R.
    |[{UPPER}]\w*(?:['’&-](?!s\b)\w+)*                 # O'Brien
    )"""
RULES = re.compile(
    rf"""(?<!\w)(?:
    (?<=["“])[{UPPER}][\w'’:&-]*(?:,?[ ][\w'’:&-]*\w){{0,6}}(?=[,.]?["”])  # a quoted work
    |\d{{1,2}}[ ]{_MONTH}(?:,?[ ]\d{{3,4}})?|{_MONTH}[ ]\d{{1,2}},?[ ]\d{{4}}  # dates
    |{_MONTH}[ ]\d{{1,4}}|\d{{1,2}}(?:st|nd|rd|th)(?:[ ]century)?|\d{{3,4}}s
    |[$£€¥]?\d+(?:[.,]\d+)*(?:[ -]?(?:{_UNIT}))?  # numbers
    |(?P<NAME>{_CAPITALISED}(?:[ ](?:{_LINK}[ ]){{0,2}}{_CAPITALISED})*{_NUMBER})
    )(?!\w)""",
    re.VERBOSE,
)


def rule_entities(text):
    """Spans of quoted works, dates, numbers with units and capitalised names, by RULES alone."""
    from spacy.lang.en.stop_words import STOP_WORDS

    spans = []
    for match in RULES.finditer(text):
        start, end = match.span()
        while match["NAME"] and (word := re.match(r"(\w+) ", text[start:end])):
            acronym = word[1].isupper() and len(word[1]) > 1
            if acronym or word[1].lower() not in STOP_WORDS:
                break
            start += word.end()  # "Although France"
        spans.append((start, end))
    return spans


@functools.cache  # once per process
def open_ner(name):
    """The function texts -> the entity spans of each: a spaCy pipeline's, or by "rules"."""
    import spacy.lang.en  # before processes are forked, which all need it

    if name == "rules":
        return lambda texts: map(rule_entities, texts)
    cure = f"python -m spacy download {name}, or --ner rules, which needs no download"
    with explained(f"--ner {name} is not installed; {cure}", OSError):
        nlp = spacy.load(name, exclude=["tagger", "parser", "attribute_ruler", "lemmatizer"])
    # vectors that only the parts left out would ask for
    if "tok2vec" in nlp.pipe_names and not nlp.get_pipe("tok2vec").listening_components:
        nlp.remove_pipe("tok2vec")

    def tag(texts):
        # what is longer than the pipeline takes is cut
        pieces, found = [], [[] for _ in texts]
        for number, text in enumerate(texts):
            for start in range(0, len(text), nlp.max_length):
                pieces.append((text[start : start + nlp.max_length], (number, start)))
        for doc, (number, start) in nlp.pipe(pieces, as_tuples=True):
            found[number] += [(start + each.start_char, start + each.end_char) for each in doc.ents]
        return found

    return tag


def find_entities(texts, ner="en_core_web_sm", processes=1):
    """Of every text the sorted spans of its fair entities: a list of lists."""
    from tqdm import tqdm

    blocks = [texts[i : i + 256] for i in range(0, len(texts), 256)]
    found = []
    # Not nlp.pipe(n_process=..): its workers send whole Docs back, 3 ms each.
    with multiprocessing.Pool(min(processes, 1 + len(texts) // 1024)) as pool:
        tagged = pool.imap(functools.partial(_fair_entities, ner=ner), blocks)
        for spans in tqdm(tagged, desc="entities", total=len(blocks), unit=" blocks", delay=1):
            found += spans
    return found


def _fair_entities(texts, ner):
    """Of every text of a block the fair entities, in a worker process."""
    found = []
    for text, entities in zip(texts, open_ner(ner)(texts)):
        spans = sorted({_trimmed(text, start, end) for start, end in entities})
        names = {text[start:end] for start, end in spans}
        # where they stand as whole words: a name within a word could not be hidden
        starts = {name: set(occurrences(text, name)) for name in names if fair(name, text)}
        # of "Murray River" and "Murray", of "Alaskan" and "Alaska" the shorter: the longer one
        # hidden, the other would still stand there
        standing = [name for name in starts if starts[name]]
        asked = [name for name in standing if sum(part in name for part in standing) == 1]
        kept = {name: starts[name] for name in asked}
        found.append([(a, b) for a, b in spans if a in kept.get(text[a:b], ())])
    return found


def _trimmed(text, start, end):
    """Less quotes, article, possessive, and words before a number: of "over 600" it is "600"."""
    before = r"""["“\s]*(?:(?i:the|an?)\s+)?(?:(?:[a-z]\S*\s+)+(?=\S{0,3}\d))?"""
    inner = re.fullmatch(rf"""(?s){before}(.*?)(?:['’]s|['’])?["”,\s]*""", text[start:end])
    return start + inner.start(1), start + inner.end(1)


def fair(name, text):
    """Whether the entity can be asked for: who understood the text could name it, and only it.

    >>> text = "According to Ann, One day is long. Days in Rome are short."
    >>> names = ["According", "Ann", "One", "Days", "Rome", "R", "[MASK]"]
    >>> [name for name in names if fair(name, text)]
    ['Ann', 'Rome']
    """
    from spacy.lang.en.stop_words import STOP_WORDS

    # it must say something; a number below 100 is a day here and a page there
    telling = set(re.findall(r"\w+", name.lower()))
    if not name.isupper():  # US and WHO are names
        telling -= STOP_WORDS
    if not telling or sum(map(str.isalnum, name)) < 2 + name.isdigit():
        return False
    # one thing in one line: no range of numbers, torn quotation, part of a placeholder
    if re.search(r'[\n"“”—]|\d\S* (?:and|to|or) ', name) or occurrences(f"{MASK}{TARGET}", name):
        return False

    # words in small letters are no name ("years later"), nor if they start a sentence ("Two men")
    capitals = name[0].title() != name[0].lower()  # not every script starts names with one
    if re.search(r"\d", name) or not name[1:].islower() or not capitals:
        return True
    if name.islower():
        return False
    if occurrences(text, name[0].lower() + name[1:]):
        return False
    return not _sentence_starts(text).issuperset(occurrences(text, name))


@functools.lru_cache(maxsize=1)  # asked for every name of a text in turn
def _sentence_starts(text):
    matches = re.finditer(rf"""(?:\A|{SENTENCE_END}|:\s)["'“‘(\[]*""", text)
    return {match.end() for match in matches}


# ---- Retrieval (section 8) -----------------------------------------------------------------------

RETRY_SECONDS = (1, 2, 4, 8, 16)  # waits between attempts at a search server
TIMEOUT_SECONDS = 120  # of one attempt


def open_retriever(source, encoder="bm25", cache=None):
    """The function (queries, k) -> for every query its best passages, best first.

    A passage is {"id", "title", "text"}; an empty query has none. source: a search server of
    Search-R1's contract (http://HOST:PORT/retrieve; for 21 million passages this is the way), or a
    corpus in any form that read_rows takes. encoder: see open_index. cache: folder for its vectors,
    ~/.cache/memtrain by default; a file is named after the texts and the encoder.
    """
    if re.match("https?://", source):
        return open_server(source)
    passages = [passage(where, row) for where, row in read_rows(source)]
    if not passages:
        raise InputError(f"{source}: no passages")

    texts = [f"{found['title']}\n{found['text']}" for found in passages]
    file = None
    if encoder != "bm25":
        folder = Path(cache or Path.home() / ".cache" / "memtrain")
        file = folder / f"vectors-{_digest(texts, encoder)[:16]}"
    search = open_index(texts, encoder, file)

    def retrieve(queries, k):
        found = search(queries, k) if queries else []
        return [[passages[row] for row, _ in hits] for hits in found]

    return retrieve


def _digest(texts, encoder):
    """A name for the vectors of these texts, by an encoder and, of one on this disk, its files."""
    digest = hashlib.sha1(encoder.encode())
    for file in sorted(Path(encoder).glob("*")):
        digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    for text in texts:
        digest.update(f"{text}\0".encode())
    return digest.hexdigest()


def open_index(texts, encoder="bm25", file=None):
    """The function (queries, k) -> for every query [(row of texts, score), ..], best first.

    encoder: "bm25", which leaves out what shares no word with the query, or a transformers model
    for dense search, exact, by inner products. file: where the vectors of the texts are kept.
    """
    if encoder == "bm25":
        return _bm25_search(texts)
    import torch

    encode = open_encoder(encoder)
    if file and file.exists():
        vectors = torch.load(file, mmap=True)  # [N, D]
    else:
        vectors = encode(texts, "passage")
        if file:
            with whole_or_nothing(file) as unfinished:
                torch.save(vectors, unfinished)
    if torch.cuda.is_available():
        vectors = vectors.cuda()

    def search(queries, k):
        found = []
        # one by one: all scores at once would be a matrix [N, queries]
        for query in encode(queries, "query").to(vectors.device):
            best = (vectors @ query).topk(min(k, len(texts)))
            found.append(list(zip(best.indices.tolist(), best.values.tolist())))
        return found

    return search


def _bm25_search(texts):
    import bm25s

    def words(texts):
        # where blanks don't part words, pairs of characters are the words
        texts = [re.sub(f"({JOINING})+", _pairs, text) for text in texts]
        return bm25s.tokenize(texts, stopwords="en", show_progress=False)

    index, indexed = bm25s.BM25(), words(texts)
    if not indexed.vocab:
        raise InputError("the passages hold no word to search for")
    index.index(indexed, show_progress=False)

    def search(queries, k):
        best = index.retrieve(words(queries), k=min(k, len(texts)), show_progress=False)
        found = []
        for rows, scores in zip(best.documents.tolist(), best.scores.tolist()):
            found.append([(row, score) for row, score in zip(rows, scores) if score > 0])
        return found

    return search


def _pairs(run):
    letters = "".join(filter(str.isalnum, run[0]))  # vowel signs would part what bm25s reads
    letters *= 2 if len(letters) == 1 else 1  # bm25s reads no word of one character
    return f" {' '.join(map(''.join, zip(letters, letters[1:])))} "


def open_encoder(name):
    """The function (texts, "query" or "passage") -> unit vectors [n, D]: means over last states."""
    import torch
    import transformers
    from tqdm import tqdm

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    with explained(f"--encoder {name}: no model that can be loaded", OSError, ValueError):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = transformers.AutoModel.from_pretrained(name, dtype=dtype)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.convert_ids_to_tokens(0)  # masked
    model.eval().to(device)
    limits = dict(truncation=True, max_length=min(512, tokenizer.model_max_length))

    @torch.no_grad()
    def encode(texts, kind):
        if "e5" in name.lower().split("/")[-1]:  # E5 was trained with these prefixes
            texts = [f"{kind}: {text}" for text in texts]
        vectors = []
        for first in tqdm(range(0, len(texts), 64), desc="encode", delay=1):
            part = texts[first : first + 64]
            batch = tokenizer(part, padding=True, return_tensors="pt", **limits).to(device)
            states = model(**batch).last_hidden_state.float()  # [n, L, D]
            seen = batch["attention_mask"][..., None]  # [n, L, 1]
            mean = (states * seen).sum(1) / seen.sum(1)  # [n, D]
            vectors.append(torch.nn.functional.normalize(mean, dim=-1).cpu())
        return torch.cat(vectors)

    return encode


def open_server(url):
    """A search server as open_retriever's function: one request for all queries.

    One that does not answer is asked again; an answer of another form is an error at once.
    """
    with explained(f"{url}: no address of a search server", ValueError):
        address = urllib.parse.urlsplit(url)
        host, _ = address.hostname or "", address.port  # raises where it is no number
    # one on this machine is asked without a proxy
    here = re.fullmatch(r"localhost|::1|127\..*", host)
    opener = urllib.request.build_opener(*[urllib.request.ProxyHandler({})] if here else [])

    def search(queries, k):
        asked = [query for query in queries if query.strip()]
        if not asked:
            return [[] for _ in queries]
        body = json.dumps({"queries": asked, "topk": k, "return_scores": True}).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        for wait in (0, *RETRY_SECONDS):
            time.sleep(wait)
            try:
                with opener.open(request, timeout=TIMEOUT_SECONDS) as reply:
                    found = iter(_hits(url, asked, reply.read()))
                return [next(found) if query.strip() else [] for query in queries]
            except urllib.error.HTTPError as error:
                if error.code < 500 and error.code != 429:
                    raise InputError(f"{url}: refused {asked[0]!r:.80} ({error})") from None
                trouble = error
            except (OSError, http.client.HTTPException) as error:  # down, late, cut off
                trouble = error
        attempts = f"no answer in {len(RETRY_SECONDS) + 1} attempts ({trouble})"
        raise InputError(f"{url}: {attempts}; start the server, then --resume")

    return search


def _hits(url, queries, reply):
    """The passages of a reply {"result": [[{"document": passage}, ..], ..]}, a list per query."""
    wanted = '{"result": a list for each query of {"document": {"contents": ..}}}'
    problem = f"{url}: not a reply of the form {wanted}, asked for {queries[0]!r:.80}"
    with explained(problem, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        result = json.loads(reply)["result"]
        if len(result) != len(queries):
            raise ValueError(f"{len(result)} results for {len(queries)} queries")
        return [[passage("document", hit["document"]) for hit in hits] for hits in result]


# ---- Command line --------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_or_nothing(path):
    """A temporary path on the same disk, renamed to `path` at the end, deleted on failure.

    A file that is there already is replaced; a folder must not be there, unless it is empty.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        unfinished = Path(folder) / path.name
        yield unfinished
        os.replace(unfinished, path)


COMMANDS = {  # flags: name, type, default (None: must be given), smallest value, help
    "build": (build, "make masked documents from a corpus", [
        ("--corpus", str, None, None, "file, folder or Hub data set of passages or articles"),
        ("--out", str, None, None, "new folder for the documents"),
        ("--documents", int, None, 1, "training documents"),
        ("--heldout", int, -1, -1, "others besides; -1: a tenth as many, at most 128"),
        ("--related", int, 29, 0, "passages related to the pivot"),
        ("--random", int, 120, 0, "random passages"),
        ("--ner", str, "en_core_web_sm", None, "spaCy pipeline, or rules: no download, coarser"),
        ("--encoder", str, "bm25", None, "what related means: bm25, or a transformers encoder"),
        ("--passage_words", int, 160, 1, "words of a passage cut from an article"),
        ("--max_passages", int, 300_000, 0, "of the corpus, 0: all; some 6 kB of memory each"),
        ("--processes", int, os.cpu_count(), 1, "processes that look for entities"),
        ("--seed", int, 0, None, "of all that is drawn"),
    ]),
    "show": (show, "print one document as the agent sees it", [
        ("dir", str, None, None, "folder that build wrote"),
        ("--tokenizer", str, "", None, "model whose tokenizer cuts the chunks"),
        ("--chunk_tokens", int, 5120, 1, "tokens of a chunk"),
        ("--split", str, "train", None, "train or heldout"),
        ("--document", int, 0, 0, "its number, from 0"),
    ]),
    "longqa": (longqa, "make long documents from questions with paragraphs", [
        ("--questions", str, None, None, "questions with context [[title, text], ..]"),
        ("--out", str, None, None, "new file, .jsonl or .jsonl.gz"),
        ("--documents", int, 200, 1, "paragraphs of a long document; 200 are about 28k tokens"),
        ("--seed", int, 0, None, "of all that is drawn"),
    ]),
}  # fmt: skip


def main(argv=None):
    """Run a command; gives the exit status, 2 after an error in its input."""
    # the parser, from the table
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="data.py", description=__doc__, formatter_class=style)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, purpose, flags) in COMMANDS.items():
        command = commands.add_parser(name, help=purpose, allow_abbrev=False)
        for flag, kind, default, _, text in flags:
            required = {"required": default is None} if flag.startswith("--") else {}
            text = text if default is None else f"{text} ({default})"
            command.add_argument(flag, type=kind, default=default, help=text, **required)
    args = parser.parse_args(argv)

    try:
        run, _, flags = COMMANDS[args.command]
        for flag, _, _, least, _ in flags:
            value = getattr(args, flag.removeprefix("--"))
            if least is not None and value < least:
                raise InputError(f"{flag} {value}: at least {least} is wanted")
        if "out" in args and os.path.exists(args.out):
            raise InputError(f"--out {args.out}: is there already; choose another name")
        run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # show DIR | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (InputError, OSError) as error:  # OSError: a full disk, a folder without permission
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
