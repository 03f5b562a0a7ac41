"""Data: from a corpus to masked documents, from questions to long documents, from passages to a search.

    python data.py build --corpus wikimedia/wikipedia:20231101.en --out DIR --documents 30000    MemTrain's documents
    python data.py build --corpus FILE.jsonl.gz --out DIR --documents 64 --ner rules             without a trained pipeline
    python data.py show DIR --tokenizer Qwen/Qwen3-4B-Instruct-2507                              one, as the agent sees it
    python data.py longqa --questions hotpotqa.jsonl.gz --documents 200 --out FILE.jsonl         long-text QA

A corpus, a set of questions and a search corpus alike are a file (.jsonl, .json, .txt, each also .gz, or .parquet), a
folder of such files, a data set of the Hub, OWNER/NAME[:CONFIG[:SPLIT]], or one file of it, OWNER/NAME:FILE.parquet.

Where the paper (section 3.2) is silent, or this differs:
  1. Articles are cut at sentence ends into passages of about 160 words, so that 150 make its 24k-40k tokens. A text of
     up to twice as many words is taken as it is.
  2. Answers are fair: no single letter, stop word or number word, and no word that is capitalised only because it
     starts a sentence. The targets of the recall task follow the same rule.
  3. Every whole-word occurrence in the very same letters is masked: of "Mark" neither "mark" nor "Marks". Texts are
     brought to Unicode NFC and single blanks first, so that a name has one spelling.
  4. An article's passages are pivots of training documents or of held-out ones, never of both.
  5. Document i is a function of the corpus, the seed and i: building more documents leaves it as it is.
"""

import argparse
import ast
import bisect
import contextlib
import functools
import gzip
import hashlib
import http.client
import json
import multiprocessing
import os
import random
import re
import sys
import tempfile
import time
import unicodedata
import urllib.error
import urllib.request
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

MASK = "[MASK]"  # hides the answer of a document (end-to-end task)
TARGET = "[TARGET]"  # hides one entity of a chunk (recall): another name, so that the two tasks can't be confused


class DataError(ValueError):
    """Bad input, in one line: what is wrong, where, what to do. The command line prints it and exits with status 2."""


# ---- Reading: the rows of any source, the passages of any corpus -----------------------------------------------------


def read_rows(source, columns=None, stream=False, seed=0):
    """Yield (place, row): every row as a dict, and where it stands, for messages. DataError where it can't be read.

    columns: of parquet only these are read ("a.b" is a field of a struct): MemAgent's files hold nested columns that
    Arrow can't read from large row groups. stream: a Hub data set is streamed and not downloaded whole.
    """
    kind = re.search(r"\.(jsonl|json|parquet|txt)(\.gz)?$", source)
    repo, _, file = source.partition(":")
    if os.path.isdir(source) or repo.count("/") == 1 and not kind and not os.path.exists(source):
        rows = _dataset_rows(source, stream, seed)
    elif repo.count("/") == 1 and file and not os.path.exists(source):
        rows = read_rows(_hub_file(repo, file), columns)
    elif not os.path.exists(source):
        raise DataError(f"{source}: no such file (a data set of the Hub is written OWNER/NAME[:CONFIG[:SPLIT]])")
    elif not kind:
        raise DataError(f"{source}: unknown kind of file; known are .jsonl, .json, .txt, each also .gz, and .parquet")
    elif kind[1] == "parquet":
        rows = _parquet_rows(source, columns)
    else:
        rows = {"jsonl": _jsonl_rows, "json": _json_rows, "txt": _text_rows}[kind[1]](source)
    for place, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{place}: a row must be a JSON object, this is a {type(row).__name__}")
        yield place, row


def _lines(path):
    number = 0
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                yield f"{path}:{number}", line
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"{path}:{number + 1}: can't be read ({_one_line(error)}); fetch the file again") from None


def _jsonl_rows(path):
    for place, line in _lines(path):
        if line.strip():
            try:
                yield place, json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{place}: not JSON ({error.msg}); repair or delete the line") from None


def _json_rows(path):
    try:
        rows = json.loads("".join(line for _, line in _lines(path)))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON ({error.msg}); a file with one row per line is called .jsonl") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}:1: a JSON list of rows is wanted, this is a {type(rows).__name__}")
    return ((f"{path}: row {number}", row) for number, row in enumerate(rows, 1))


def _text_rows(path):
    """Plain text in blocks of some 20,000 characters. Lines are joined: paragraphs end at an empty one."""
    block, paragraph, size = [], [], 0
    for place, line in _lines(path):
        paragraph.append(line.strip())
        size += len(line)
        if not line.strip():
            block, paragraph = [*block, " ".join(paragraph)], []
            if size > 20_000:
                yield place, {"title": "", "text": "\n".join(block)}
                block, size = [], 0
    yield f"{path}: end", {"title": "", "text": "\n".join([*block, " ".join(paragraph)])}


def _parquet_rows(path, columns):
    import pyarrow
    import pyarrow.parquet

    try:
        file, number = pyarrow.parquet.ParquetFile(path), 0
        wanted = columns and [name for name in columns if name.split(".")[0] in file.schema_arrow.names]
        for batch in file.iter_batches(batch_size=64, columns=wanted):  # few: a row may hold 150 kB of text
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: can't be read as parquet ({_one_line(error)}); fetch the file again") from None


def _dataset_rows(source, stream, seed):
    """A Hub data set or a folder of files. A stream is shuffled: the first articles of Wikipedia are no sample of it."""
    import datasets

    name, config, split = [source, "", ""] if os.path.isdir(source) else (source.split(":") + ["", ""])[:3]
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=stream)
        rows = rows.shuffle(seed=seed, buffer_size=10_000) if stream else rows
        yield from ((f"{source}: row {number}", row) for number, row in enumerate(rows, 1))
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise DataError(f"{source}: neither a file nor a data set that can be loaded ({_one_line(error)})") from None


def _hub_file(repo, file):
    import huggingface_hub

    try:
        return huggingface_hub.hf_hub_download(repo, file, repo_type="dataset")
    except (huggingface_hub.errors.HfHubHTTPError, OSError, ValueError) as error:
        raise DataError(f"{repo}:{file}: neither a file nor one that the Hub gives ({_one_line(error)})") from None


def _one_line(error):
    return " ".join(str(error).split())[:200]


def passage(place, row):
    """A row as {"id", "title", "text"}: rows of {title, text}, or wiki-18's {contents}, a quoted title and a text.

    >>> passage("f:1", {"id": "7", "contents": '"Rome"\\nRome is a  city.'})
    {'id': '7', 'title': 'Rome', 'text': 'Rome is a city.'}
    """
    title, text = row.get("title"), row.get("text")
    if text is None and isinstance(row.get("contents"), str):
        title, _, text = row["contents"].partition("\n")
        title = title.strip().strip('"')
    if not isinstance(text, str):
        raise DataError(f"{place}: no text; a passage is {{id, title, text}} or {{id, contents}}, this row has {sorted(row)}")
    return {"id": str(row.get("id", place)), "title": tidy(str(title or "")).replace("\n", " "), "text": tidy(text)}


def tidy(text):
    r"""Unicode NFC, single blanks, no empty lines.

    >>> tidy("Beyonce\u0301 \u00a0 sang. \n\n She left.")
    'Beyoncé sang.\nShe left.'
    """
    lines = (" ".join(line.split()) for line in unicodedata.normalize("NFC", text).splitlines())
    return "\n".join(line for line in lines if line)


UPPER = "".join(c for c in map(chr, range(0x2000)) if c.isupper())  # Latin, Greek, Cyrillic ..: `re` has no class for it
_STARTER = r"(?:The|An?|In|On|At|By|As|It|Its|He|His|She|Her|They|This|These|For|From|After|During|When|While|Although|However)\b"
_ABBREVIATION = rf"(?<!\b(?:Mr|Ms|Dr|St|Jr|Sr|vs|No)\.)(?<!Mrs\.)(?<!\b[{UPPER}]\.)"  # a full stop that is none
SENTENCE_END = rf"""\n|[.!?]{_ABBREVIATION}["'”’)\]]*\s+(?=["'“‘(\[]*[{UPPER}\d])"""


def cut(text, words):
    """Cut text at sentence ends into pieces of about `words` words; up to twice as many stay whole.

    >>> cut("One two. Three four. Five six. Seven eight. Nine.", 4)
    ['One two. Three four.', 'Five six. Seven eight. Nine.']
    """
    if len(text.split()) <= 2 * words:
        return [text]
    pieces, start, last, count = [], 0, 0, 0
    for end in [*(m.end() for m in re.finditer(SENTENCE_END, text)), len(text)]:
        size = len(text[last:end].split())
        if count and count + size - words > words - count:  # farther from the wanted size with this sentence
            pieces.append(text[start:last].strip())
            start, count = last, 0
        count, last = count + size, end
    rest = text[start:].strip()
    return [*pieces[:-1], f"{pieces[-1]} {rest}"] if pieces and count < words / 2 else [*pieces, rest]


def read_corpus(source, words=160, limit=0, seed=0):
    """The passages of a corpus: (texts, keys), a text being title, line break and text, a key naming the article.

    Left out: doubles, empty texts, and those that hold a placeholder. limit: at most so many passages (0: all), the
    first of a file, a shuffled stream of a data set on the Hub.
    """
    from tqdm import tqdm

    texts, keys, seen = [], [], set()
    for place, row in tqdm(read_rows(source, stream=limit > 0, seed=seed), desc="read", unit=" rows", delay=1):
        found = passage(place, row)
        for piece in cut(found["text"], words):
            text = f"{found['title']}\n{piece}" if found["title"] else piece
            if piece and MASK not in text and TARGET not in text and hash(text) not in seen:
                seen.add(hash(text))
                texts.append(text)
                keys.append(found["title"] or str(len(texts)))
        if limit and len(texts) >= limit:
            return texts[:limit], keys[:limit]
    return texts, keys


# ---- Entities --------------------------------------------------------------------------------------------------------

NUMBER_WORDS = set(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million billion trillion dozen half "
    "quarter first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth once twice hundreds thousands "
    "millions billions dozens".split()
)
_MONTH = "(?:January|February|March|April|May|June|July|August|September|October|November|December)"
_UNIT = (
    "%|percent|per cent|hundred|thousand|million|billion|km|kilomet(?:er|re)s?|m|met(?:er|re)s?|cm|mm|miles?|feet|ft|inches|kg|"
    "kilograms?|tonn?es?|tons?|pounds?|acres|hectares|square (?:miles|kilomet(?:er|re)s)|mph|hours?|minutes|seconds|days|weeks|"
    "months|years?|people|inhabitants|dollars|euros"
)
_CAPITALISED = rf"(?:(?:[{UPPER}]\.){{2,}}|[{UPPER}]\.(?=[ ][{UPPER}])(?![ ]{_STARTER})|[{UPPER}]\w*(?:['’&-](?!s\b)\w+)*)"
_LINK = "(?:of|the|de|la|le|du|des|van|von|der|den|di|da|del|della|dos|al|bin|ibn|y|och|und|et)"
RULES = re.compile(
    rf"""(?<!\w)(?:
    (?<=["“])(?P<WORK>[{UPPER}][\w'’:&-]*(?:,?\ [\w'’:&-]*\w){{0,6}})(?=[,.]?["”])
    |(?P<DATE>\d{{1,2}}\ {_MONTH}(?:,?\ \d{{3,4}})?|{_MONTH}\ \d{{1,2}},?\ \d{{4}}|{_MONTH}\ \d{{1,4}}
             |\d{{1,2}}(?:st|nd|rd|th)(?:\ century)?|\d{{3,4}}s)
    |(?P<NUMBER>[$£€¥]?\d+(?:[.,]\d+)*(?:[ -]?(?:{_UNIT.replace(" ", "[ ]")}))?)
    |(?P<NAME>{_CAPITALISED}(?:\ (?:{_LINK}\ ){{0,2}}{_CAPITALISED})*(?:\ \d{{1,3}})?)
    )(?!\w)""",
    re.VERBOSE,
)


def find_names(doc):
    """The rule-based stand-in for a trained spaCy component: dates, numbers with units, quoted works, capitalised names."""
    from spacy.lang.en.stop_words import STOP_WORDS

    text, spans = doc.text, []
    for match in RULES.finditer(text):
        start = match.start()
        while match.lastgroup == "NAME" and (word := re.match(r"(\w+) ", text[start : match.end()])):
            if word[1].lower() not in STOP_WORDS or word[1].isupper() and len(word[1]) > 1:
                break
            start += word.end()  # "Although France"
        spans.append(doc.char_span(start, match.end(), label=match.lastgroup))
    doc.ents = spans
    return doc


@functools.cache  # one per process
def _pipeline(name):
    import spacy

    if name == "rules":
        spacy.Language.component("find_names", func=find_names)
        nlp = spacy.blank("en")
        nlp.tokenizer = lambda text: spacy.tokens.Doc(nlp.vocab, words := re.findall(r"\w+|\W", text), [False] * len(words))
        nlp.add_pipe("find_names")
        return nlp
    try:
        return spacy.load(name, exclude=["tagger", "parser", "attribute_ruler", "lemmatizer"])
    except OSError:
        cure = f"python -m spacy download {name} (or --ner rules, which needs no download)"
        raise DataError(f"--ner {name} is not installed: {cure}") from None


def find_entities(texts, ner="en_core_web_sm", processes=1):
    """Of every text the character spans of its fair entities, a list of int32 arrays [n, 2], sorted."""
    from tqdm import tqdm

    blocks = (texts[i : i + 256] for i in range(0, len(texts), 256))
    # Not nlp.pipe(n_process=..): its workers send whole Docs back, and 3 ms each is more than the rules take.
    bar = tqdm(desc="entities", total=len(texts), unit=" passages", delay=1)
    with multiprocessing.Pool(min(processes, 1 + len(texts) // 1024)) as pool, bar:
        found = []
        for spans in pool.imap(functools.partial(_tag, ner=ner), blocks):
            found += spans
            bar.update(len(spans))
    return found


def _tag(texts, ner):
    found = []
    for text, doc in zip(texts, _pipeline(ner).pipe(texts)):
        spans = sorted({_trimmed(text, entity.start_char, entity.end_char) for entity in doc.ents})
        names = {name for name in {text[start:end] for start, end in spans} if fair(name, text)}
        found.append(np.array([(start, end) for start, end in spans if text[start:end] in names], np.int32).reshape(-1, 2))
    return found


def _trimmed(text, start, end):
    """Without article and possessive: masking "the United States" would leave "United States" elsewhere."""
    core = re.fullmatch(r"(?is)\s*(?:(?:the|an?)\s+)?(.*?)(?:['’]s|['’])?\s*", text[start:end])
    return start + core.start(1), start + core.end(1)


def fair(name, text):
    """Whether the entity can be asked for: someone who understood the text could name it, and only it.

    >>> text = "According to Ann, One day is long. Days in Rome are short."
    >>> [name for name in ("According", "Ann", "One", "Days", "Rome", "R", "[MASK]") if fair(name, text)]
    ['Ann', 'Rome']
    """
    from spacy.lang.en.stop_words import STOP_WORDS

    words = [word.lower() for word in re.findall(r"\w+", name)]
    common = all(word in NUMBER_WORDS or word in STOP_WORDS and not name.isupper() for word in words)  # US and WHO are names
    if common or sum(map(str.isalnum, name)) < 2 or "\n" in name or occurrences(f"{MASK} {TARGET}", name):
        return False
    if len(words) > 1 or not name[0].isupper():
        return True
    elsewhere_small = occurrences(text, name[0].lower() + name[1:])
    return not elsewhere_small and not _sentence_starts(text).issuperset(occurrences(text, name))


@functools.lru_cache(maxsize=1)
def _sentence_starts(text):
    return {match.end() for match in re.finditer(rf"""(?:\A|{SENTENCE_END}|:\s)["'“‘(\[]*""", text)}


# ---- Masked documents (section 3.2) ----------------------------------------------------------------------------------


def occurrences(text, entity):
    """Where entity stands in text as a whole word: a list of starts. A line break may stand for a blank.

    >>> occurrences("Rome, Romeo and new\\nRome; Rome_2", "Rome"), occurrences("in New\\nYork", "New York")
    ([0, 20], [3])
    """
    text, found, end = text.replace("\n", " "), [], 0
    while (start := text.find(entity, end)) >= 0:
        inside = _in_word(text[start - 1 : start]) or _in_word(text[start + len(entity) : start + len(entity) + 1])
        end = start + (1 if inside else len(entity))
        found += [] if inside else [start]
    return found


def _in_word(character):
    # isalnum leaves out the accents and vowel signs that follow a letter in many scripts (category M)
    return character.isalnum() or character == "_" or character != "" and unicodedata.category(character)[0] == "M"


def mask(text, entity, spans=(), placeholder=MASK):
    """Put the placeholder for every occurrence of entity: (text, spans), the spans moved along, those that it hits dropped.

    >>> mask("Rome: a Roman left Rome for Ostia.", "Rome", [(0, 4), (8, 13), (19, 23), (28, 33)])
    ('[MASK]: a Roman left [MASK] for Ostia.', [[10, 15], [32, 37]])
    """
    starts = np.array(occurrences(text, entity), int)
    spans = np.array(spans, int).reshape(-1, 2)
    before = np.searchsorted(starts + len(entity), spans[:, 0], side="right")  # occurrences that end before the span starts
    free = before == np.searchsorted(starts, spans[:, 1], side="left")  # all others start after it ends
    moved = spans[free] + before[free, None] * (len(placeholder) - len(entity))
    pieces = [text[a:b] for a, b in zip([0, *(starts + len(entity))], [*starts, len(text)])]
    return placeholder.join(pieces), moved.tolist()


def assemble(texts, entities, pivot, related, total, min_passages, rng):
    """(document, how many of its passages hold the answer): `total` passages around the pivot; (None, 0) if no entity fits.

    related: rows of texts, best first; random passages fill up. The answer is drawn among the pivot's entities that
    stand in min_passages passages or more, the pivot being one.
    """
    names = sorted({texts[pivot][start:end] for start, end in entities[pivot]})
    chosen = dict.fromkeys([pivot, *related])
    chosen = [*chosen, *(row for row in rng.sample(range(len(texts)), total) if row not in chosen)][:total]
    rng.shuffle(chosen)
    starts = np.cumsum([0] + [len(texts[row]) + 2 for row in chosen])[:-1]
    text = "\n\n".join(texts[row] for row in chosen)
    spans = np.concatenate([entities[row] + start for row, start in zip(chosen, starts)])
    for answer in rng.sample(names, len(names)):
        holders = len({bisect.bisect(starts, start) for start in occurrences(text, answer)})
        if holders >= min_passages:
            text, spans = mask(text, answer, spans)
            assert not occurrences(text, answer), f"{answer!r} is still in the document"
            return {"text": text, "answer": answer, "entities": spans}, holders
    return None, 0


def draw_documents(texts, entities, pivots, related, args, name, count, report):
    """Yield `count` documents with pivots drawn from `pivots` (rows of texts). 64 of them share one search."""
    if not any(len(entities[row]) for row in pivots):
        raise DataError(f"no passage for {name} documents has an entity; use a larger corpus, another --ner or --heldout 0")
    for first in range(0, count, 64):
        draws = {i: random.Random(f"{args.seed}/{name}/{i}") for i in range(first, min(first + 64, count))}
        done = {}
        for _ in range(100):
            drawn = {i: rng.choice(pivots) for i, rng in draws.items() if i not in done}
            for i, pivot in drawn.items():
                while not len(entities[pivot]):
                    report["replaced"] += 1
                    drawn[i] = pivot = draws[i].choice(pivots)
            for (i, pivot), rows in zip(drawn.items(), related(list(drawn.values()))):
                total = 1 + args.related + args.random
                built, holders = assemble(texts, entities, pivot, rows, total, args.min_passages, draws[i])
                if built:
                    done[i] = {"id": f"{name}-{i:06d}", **built}
                    report["alone"] += holders == 1
                else:
                    report["replaced"] += 1
            if len(done) == len(draws):
                break
        else:
            raise DataError(f"--min_passages {args.min_passages}: none of 100 pivots has such an entity; lower it or raise --related")
        yield from (done[i] for i in draws)


def related_to(texts, encode, count):
    """The function from rows of texts to the `count` others most related to each, best first; bm25s where encode is None."""
    vectors = embed(texts, encode) if encode else None
    search = bm25_index(texts) if not encode else None

    def related(rows):
        hits = nearest(vectors, vectors[rows].float(), count + 1) if encode else search([texts[row] for row in rows], count + 1)
        return [[other for other, _ in own if other != row][:count] for row, own in zip(rows, hits)]

    return related


def build(args):
    """Write a DatasetDict of train and heldout to args.out: {"id", "text", "answer", "entities": [[start, end], ..]}."""
    import datasets
    from datasets.arrow_writer import ArrowWriter
    from tqdm import tqdm

    datasets.disable_progress_bars()
    start, total = time.time(), 1 + args.related + args.random
    refuse(args.out)
    _pipeline(args.ner)  # what is not installed is said before hours of reading
    encode = None if args.encoder == "bm25" else open_encoder(args.encoder)
    texts, keys = read_corpus(args.corpus, args.passage_words, args.max_passages, args.seed)
    if len(texts) < total:
        raise DataError(f"{args.corpus}: {len(texts)} passages, a document needs {total}; use more, or lower --random and --related")
    entities = find_entities(texts, args.ner, args.processes)
    if not any(map(len, entities)):
        raise DataError(f"{args.corpus}: no passage has an entity that --ner {args.ner} finds; wrong language or wrong column?")
    related = related_to(texts, encode, args.related)
    ready = time.time()

    # A tenth of the articles is kept for held-out pivots, whether any are built or not: the train side stays the same.
    sides = {"train": [], "heldout": []}
    for row, key in enumerate(keys):
        sides["train" if zlib.crc32(f"{args.seed}/{key}".encode()) % 10 else "heldout"].append(row)
    counts = {"train": args.documents, "heldout": min(128, -(-args.documents // 10)) if args.heldout is None else args.heldout}
    report, words = Counter(), []
    features = datasets.Features(
        {"id": datasets.Value("string"), "text": datasets.Value("string"), "answer": datasets.Value("string"),
         "entities": datasets.List(datasets.List(datasets.Value("int32")))}
    )  # fmt: skip
    bar = tqdm(desc="build", total=sum(counts.values()), unit=" documents")
    with whole_or_nothing(args.out) as out, bar:
        parts = datasets.DatasetDict()
        for name, count in counts.items():  # written one by one: 30,000 documents are 5 GB
            with ArrowWriter(path=f"{out}.{name}", features=features, writer_batch_size=64) as writer:
                for document in draw_documents(texts, entities, sides[name], related, args, name, count, report) if count else ():
                    words.append(len(document["text"].split()))
                    writer.write(document)
                    bar.update()
                writer.finalize()
            parts[name] = datasets.Dataset.from_file(f"{out}.{name}")
        # Without the number of shards an empty part is saved in a form that can't be loaded.
        parts.save_to_disk(out, num_shards={name: 1 + count // 2000 for name, count in counts.items()})
    distinct = np.mean([len({text[a:b] for a, b in spans}) for text, spans in zip(texts, entities)])
    size = f"{total} passages, {min(words)} to {max(words)} words"
    print(f"{args.out}: {counts['train']} train and {counts['heldout']} heldout documents of {size}")
    print(f"{len(texts)} passages with {distinct:.1f} distinct entities each; {report['replaced']} pivots replaced")
    print(f"{report['alone']} of {len(words)} answers ({report['alone'] / len(words):.0%}) stand in no other passage of their document")
    print(f"{ready - start:.0f} s to read, tag and index, {len(words) / (time.time() - ready):.1f} documents/s")


def load_documents(path, split):
    """The documents that `build` wrote to the folder `path`, split "train" or "heldout": a datasets.Dataset."""
    import datasets

    if not os.path.exists(f"{path}/dataset_dict.json"):
        raise DataError(f"{path}: no documents here; make them with: python data.py build --corpus .. --out {path}")
    return datasets.load_from_disk(str(path))[split]


# ---- Chunks, and the recall task (section 3.3) -----------------------------------------------------------------------


class Chunk(NamedTuple):
    ids: list[int]
    start: int  # its characters are text[start:end]; chunk by chunk they make up the whole text
    end: int


def chunks(text, tokenizer, chunk_tokens):
    """Cut the text by tokens: every chunk but the last has exactly chunk_tokens; "" is one empty chunk.

    The ids are those of tokenizer(text) in one call, but the text goes through it in pieces of some 200,000 characters:
    one call on 900k tokens takes 0.7 GB more and no less time.
    """
    done, ids, ends, start = [], [], [], 0
    for offset, piece in _safe_pieces(text, tokenizer):
        encoded = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids += encoded["input_ids"]
        ends += [offset + end for _, end in encoded["offset_mapping"]]
        while len(ids) > chunk_tokens:  # not >=: the last chunk takes the characters that belong to no token
            # A character of several tokens belongs to the chunk of its first one.
            done.append(Chunk(ids[:chunk_tokens], start, max(start, ends[chunk_tokens - 1])))
            start, ids, ends = done[-1].end, ids[chunk_tokens:], ends[chunk_tokens:]
    return [*done, Chunk(ids, start, len(text))]


def _safe_pieces(text, tokenizer, size=200_000):
    """(offset, piece): cut after line breaks, where byte-level tokenizers never merge; whole if this one does anyway."""
    cuts = [0]
    while cuts[-1] + size < len(text) and (found := re.compile(r"\n(?=\S)").search(text, cuts[-1] + size)):
        cuts.append(found.end())
    if len(cuts) > 1:  # a tokenizer may add a blank to the start of every text (SentencePiece): try one cut
        ids = lambda part: tokenizer(part, add_special_tokens=False)["input_ids"]
        before, after = text[: cuts[1]][-2000:], text[cuts[1] : cuts[1] + 2000]
        if ids(before + after) != ids(before) + ids(after):
            return [(0, text)]
    return [(a, text[a:b]) for a, b in zip(cuts, [*cuts[1:], len(text)])]


class Recall(NamedTuple):
    k: int  # the memory after turn k ..
    l: int  # .. is asked for an entity of chunk l < k; both count from 1; k = l = 1 where there is one chunk
    ids: list[int]  # chunk l with the entity hidden
    target: str


def draw_recall(document, chunks, tokenizer, chunk_tokens, rng):
    """Draw k uniformly from 2..T, l below it, and an entity wholly inside chunk l; None where no chunk has one.

    If chunk l has none, the other chunks are tried in random order, those below k first. The entity becomes [TARGET] and
    the chunk is encoded again; tokens that are now too many go from the end farther from the target.
    """
    text, count = document["text"], len(chunks)
    k = rng.randint(2, count) if count > 1 else 1
    order = [1] if count == 1 else [*rng.sample(range(1, k), k - 1), *rng.sample(range(k, count), count - k)]
    for l in order:
        _, start, end = chunks[l - 1]
        names = {text[a:b] for a, b in document["entities"] if start <= a and b <= end}
        names = sorted(name for name in names if name != document["answer"] and MASK not in name)
        if names:
            target = rng.choice(names)
            ids = _hide(text[start:end], target, tokenizer, chunk_tokens)
            return Recall(k if l < k or count == 1 else rng.randint(l + 1, count), l, ids, target)
    return None


def _hide(text, target, tokenizer, chunk_tokens):
    masked, _ = mask(text, target, placeholder=TARGET)
    ids = tokenizer(masked, add_special_tokens=False, verbose=False)["input_ids"]
    if masked.find(TARGET) > len(masked) - masked.rfind(TARGET) - len(TARGET):  # more text before the target than after
        return ids[-chunk_tokens:]
    return ids[:chunk_tokens]


def show(args):
    """Print a document chunk by chunk, its answer, and one recall drawn from it."""
    documents = load_documents(args.dir, args.split)
    if not 0 <= args.document < len(documents):
        raise DataError(f"{args.dir}: {args.split} has {len(documents)} documents, --document counts from 0")
    document = documents[args.document]
    text, tokenizer = document["text"], None
    if args.tokenizer:
        import transformers

        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(args.tokenizer)
        except (OSError, ValueError) as error:
            raise DataError(f"--tokenizer {args.tokenizer}: can't be loaded ({_one_line(error)})") from None
        parts = chunks(text, tokenizer, args.chunk_tokens)
    else:  # a token is about three quarters of an English word
        starts = [match.start() for match in re.finditer(r"\S+", text)][:: max(1, args.chunk_tokens * 3 // 4)]
        parts = [Chunk([], a, b) for a, b in zip(starts, [*starts[1:], len(text)])]
    counts = f"{len(text.split())} words, {text.count(MASK)} masks, {len(document['entities'])} entities"
    print(f"document {document['id']}: {len(parts)} chunks, {counts}")
    for number, part in enumerate(parts, 1):
        size = f"{len(part.ids)} tokens" if tokenizer else "cut by words; --tokenizer cuts as training does"
        print(f"\n---- chunk {number} of {len(parts)} ({size}) ----\n{text[part.start : part.end].strip()}")
    print(f"\n---- answer: {MASK} is {document['answer']!r}")
    if tokenizer and (recall := draw_recall(document, parts, tokenizer, args.chunk_tokens, random.Random(args.seed))):
        print(f"---- a recall: after turn {recall.k}, {TARGET} in chunk {recall.l} is {recall.target!r}")


# ---- Questions (sections 6 to 8) -------------------------------------------------------------------------------------

QUESTION_COLUMNS = (
    "id index question input answers golden_answers answer context supporting_facts supporting_idx data_source prompt "
    "reward_model.ground_truth extra_info.question extra_info.index"
).split()
MEMAGENT_KEYS = {"context": "context", "input": "question", "answers": "answers", "num_docs": "num_docs"}
IN_MEMORY = 256 << 20  # a larger parquet file of questions is read through a memory-mapped copy, in bytes


def load_questions(path, objectives=None):
    """Questions of any of the field's formats: {"id", "source", "question", "answers": [str, ..], "context": str}.

    MemAgent's parquet and eval_*.json, {question, answers, context: [[title, text], ..]}, FlashRAG's golden_answers; from
    a file, a folder or the Hub. With objectives, rows of several questions each: see pair_questions.
    """
    if path == "BytedTsinghua-SIA/hotpotqa":
        path += ":hotpotqa_train_32k.parquet"  # the folder also holds evaluation files of other columns
    if path.endswith(".parquet") and os.path.exists(path) and os.path.getsize(path) > IN_MEMORY and not objectives:
        import datasets

        stamp = os.stat(path).st_mtime_ns  # part of the cache's key
        return datasets.Dataset.from_generator(_question_rows, gen_kwargs={"path": path, "stamp": stamp}, writer_batch_size=64)
    rows = list(_question_rows(path))
    if not rows:
        raise DataError(f"{path}: no questions")
    return pair_questions(rows, objectives) if objectives else rows


def _question_rows(path, stamp=0):
    for place, row in read_rows(path, QUESTION_COLUMNS):
        yield question_row(place, row)


def question_row(place, row):
    """One row of any format as a question.

    >>> question_row("f:1", {"index": 3, "input": "Who?", "answers": "['Ann']", "context": [["Ann", "She did."]]})
    {'id': '3', 'source': '', 'question': 'Who?', 'answers': ['Ann'], 'context': 'Document 1:\\nAnn\\nShe did.'}
    """
    extra, reward = (row[name] if isinstance(row.get(name), dict) else {} for name in ("extra_info", "reward_model"))
    question = row.get("question") or row.get("input") or extra.get("question")
    if not question and isinstance(row.get("prompt"), list):
        question = next((turn.get("content") for turn in row["prompt"][-1:] if isinstance(turn, dict)), None)
    answers = [row.get(name) for name in ("answers", "golden_answers", "answer")] + [reward.get("ground_truth")]
    answers = next((answer for answer in answers if answer not in (None, "", [])), [])
    if isinstance(answers, str) and re.fullmatch(r"\[.*\]", answers, re.DOTALL):  # a list that went through str()
        with contextlib.suppress(ValueError, SyntaxError):
            answers = ast.literal_eval(answers)
    answers = [str(answer) for answer in (answers if isinstance(answers, list) else [answers]) if str(answer).strip()]
    if not question or not answers:
        raise DataError(f"{place}: a question needs a question and an answer, this row has {sorted(row)}")
    identity = next((str(value) for value in (row.get("id"), extra.get("index"), row.get("index")) if value is not None), place)
    context = row.get("context") or ""
    context = context if isinstance(context, str) else lay_out(paragraphs(place, row))
    source = row.get("data_source") or ""
    return {"id": identity, "source": source, "question": str(question).strip(), "answers": answers, "context": context}


def paragraphs(place, row):
    """The row's own [(title, text), ..], from [[title, text or sentences], ..] or HotpotQA's {"title": .., "sentences": ..}."""
    context = row.get("context") or []
    try:
        pairs = zip(context["title"], context["sentences"]) if isinstance(context, dict) else context
        return [(title, text if isinstance(text, str) else "".join(text)) for title, text in pairs]
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{place}: context must be a text or [[title, text], ..]") from None


def lay_out(pairs):
    """MemAgent's layout.

    >>> lay_out([("Rome", "A city."), ("Nile", "A river.")])
    'Document 1:\\nRome\\nA city.\\n\\nDocument 2:\\nNile\\nA river.'
    """
    return "\n\n".join(f"Document {number}:\n{title}\n{text}" for number, (title, text) in enumerate(pairs, 1))


def pair_questions(rows, objectives):
    """Join consecutive questions of one source, `objectives` at a time; what is left over at a source's end is dropped.

    >>> pair_questions([question_row("", {"id": n, "question": f"Q{n}?", "answers": [n]}) for n in "abc"], 2)
    [{'id': 'a+b', 'source': '', 'question': 'Qa?; Qb?', 'answers': [['a'], ['b']], 'context': ''}]
    """
    sources = {}
    for row in rows:
        sources.setdefault(row.get("source", ""), []).append(row)
    groups = (own[i : i + objectives] for own in sources.values() for i in range(0, len(own) - objectives + 1, objectives))
    return [
        {
            "id": "+".join(row["id"] for row in group),
            "source": group[0].get("source", ""),
            "question": "; ".join(row["question"] for row in group),
            "answers": [row["answers"] for row in group],  # one list of golds per question
            "context": "",
        }
        for group in groups
    ]


def longqa(args):
    """Long documents: a question's own paragraphs among random others, no title twice, shuffled with a seed per question.

    MemAgent's sit at the same positions in every sample (one shuffle seed); here the position says nothing.
    """
    from tqdm import tqdm

    refuse(args.out)
    if not re.search(r"\.(jsonl|json)(\.gz)?$", args.out) or args.out.endswith(".json.gz"):
        raise DataError(f"--out {args.out}: .jsonl, .jsonl.gz or .json (MemAgent's eval format) can be written")
    rows = [(question_row(place, row), _own(place, row)) for place, row in read_rows(args.questions, QUESTION_COLUMNS)]
    without, rows = sum(not own for _, own in rows), [pair for pair in rows if pair[1]]
    pool = {title: text for _, own in rows for title, text in own.items()}
    titles = list(pool)
    if not 0 < args.documents <= len(pool):
        raise DataError(f"{args.questions}: {len(pool)} paragraphs of different titles, --documents {args.documents} needs as many")
    whole = args.out.endswith(".json")  # one list; else a row per line
    with whole_or_nothing(args.out) as out, (gzip.open if args.out.endswith(".gz") else open)(out, "wt", encoding="utf-8") as file:
        for number, (question, own) in enumerate(tqdm(rows, desc="longqa", unit=" documents")):
            rng = random.Random(f"{args.seed}/{question['id']}")
            others = [title for title in rng.sample(titles, args.documents) if title not in own]
            chosen = [*own, *others][: args.documents]
            rng.shuffle(chosen)
            row = {**question, "context": lay_out((title, own.get(title) or pool[title]) for title in chosen), "num_docs": len(chosen)}
            if whole:
                row = {key: row[value] for key, value in MEMAGENT_KEYS.items()} | {"index": number}
            file.write(("[" if whole and not number else "," if whole else "") + json.dumps(row, ensure_ascii=False) + "\n")
        file.write("]\n" if whole else "")
    print(f"{args.out}: {len(rows)} questions with {args.documents} documents each, out of {len(pool)} paragraphs")
    if without:
        print(f"{without} questions have no paragraphs of their own and were left out")


def _own(place, row):
    """{title: text} of the row's paragraphs, the gold ones first (all that is kept when few documents are wanted)."""
    if isinstance(row.get("context"), str):
        return {}
    facts = row.get("supporting_facts") or []
    gold = set(facts["title"] if isinstance(facts, dict) else [title for title, _ in facts])
    pairs = paragraphs(place, row)
    gold |= {pairs[i][0] for i in row.get("supporting_idx") or []}
    own = {}
    for title, text in sorted(pairs, key=lambda pair: pair[0] not in gold):
        own[title] = f"{own[title]}\n{text}" if title in own else text
    return own


# ---- Retrieval (section 8) -------------------------------------------------------------------------------------------

RETRY_SECONDS = (1, 2, 4, 8, 16)  # waits between attempts at a search server
TIMEOUT_SECONDS = 120  # of one attempt


def open_retriever(source, encoder="bm25", cache=None):
    """The function (queries, k) -> for every query its best passages, [{"id", "title", "text", "score"}, ..].

    source: a search server (http://HOST:PORT/retrieve, Search-R1's contract), or a corpus in any form that read_rows
    takes. encoder: "bm25", or a transformers model for dense search. cache: folder for the index of a local file, by
    default ~/.cache/memtrain; its name is made of the file's path, size and time and of the encoder.
    """
    if re.match("https?://", source):
        return functools.partial(_ask_server, source)
    passages = [passage(place, row) for place, row in read_rows(source)]
    if not passages:
        raise DataError(f"{source}: no passages")
    texts = [f"{found['title']}\n{found['text']}" for found in passages]
    folder = None
    if os.path.isfile(source):
        stat = os.stat(source)
        key = f"{os.path.abspath(source)} {stat.st_size} {stat.st_mtime_ns} {encoder}"
        folder = Path(cache or Path.home() / ".cache" / "memtrain") / f"index-{hashlib.sha1(key.encode()).hexdigest()[:16]}"
    if encoder == "bm25":
        search = bm25_index(texts, folder)
    else:
        encode = open_encoder(encoder)
        vectors = embed(texts, encode, folder)
        search = lambda queries, k: nearest(vectors, encode(queries, "query"), k)

    def retrieve(queries, k):
        return [[{**passages[row], "score": score} for row, score in hits] for hits in search(queries, k)] if queries else []

    return retrieve


def bm25_index(texts, folder=None):
    """The function (queries, k) -> [[(row of texts, score), ..], ..], best first, score 0 left out. folder: where it is kept."""
    import bm25s

    if folder and folder.exists():
        index = bm25s.BM25.load(str(folder))
    else:
        index, words = bm25s.BM25(), bm25s.tokenize(texts, stopwords="en", show_progress=False)
        if not words.vocab:
            raise DataError("the passages hold no word to search for")
        index.index(words, show_progress=False)
        if folder:
            with whole_or_nothing(folder) as unfinished:
                index.save(str(unfinished), show_progress=False)

    def search(queries, k):
        tokens = bm25s.tokenize(queries, stopwords="en", show_progress=False)
        found = index.retrieve(tokens, k=min(k, len(texts)), show_progress=False)
        pairs = zip(found.documents.tolist(), found.scores.tolist())
        return [[(row, score) for row, score in zip(*pair) if score > 0] for pair in pairs]

    return search


def open_encoder(name):
    """The function (texts, "query" or "passage") -> unit vectors [n, D], float32: mean over the last layer's tokens."""
    import torch
    import transformers

    try:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = transformers.AutoModel.from_pretrained(name, dtype=torch.float16 if device == "cuda" else torch.float32)
    except (OSError, ValueError) as error:
        raise DataError(f"--encoder {name}: neither bm25 nor a model that can be loaded ({_one_line(error)})") from None
    model.eval().to(device)

    @torch.no_grad()
    def encode(texts, kind):
        if "e5" in name.lower().split("/")[-1]:  # E5 was trained with these prefixes
            texts = [f"{kind}: {text}" for text in texts]
        length = min(512, tokenizer.model_max_length)
        batch = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt").to(device)
        seen = batch["attention_mask"][..., None]  # [B, L, 1]
        mean = (model(**batch).last_hidden_state.float() * seen).sum(1) / seen.sum(1)  # [B, D]
        return torch.nn.functional.normalize(mean, dim=-1).cpu()

    return encode


def embed(texts, encode, file=None):
    """The passages' vectors, float16 [n, D], kept in `file`; on the GPU if they take less than a quarter of what is free."""
    import torch
    from tqdm import tqdm

    batches = (encode(texts[i : i + 64], "passage").half() for i in tqdm(range(0, len(texts), 64), desc="encode", delay=1))
    if file and not file.exists():
        with whole_or_nothing(file) as unfinished, open(unfinished, "wb") as out:
            out.writelines(batch.numpy().tobytes() for batch in batches)
    vectors = torch.from_numpy(np.memmap(file, np.float16, "c")).view(len(texts), -1) if file else torch.cat(list(batches))
    fits = torch.cuda.is_available() and vectors.nbytes < torch.cuda.mem_get_info()[0] / 4
    return vectors.cuda() if fits else vectors


def nearest(vectors, queries, k):
    """Exact inner products, block by block: for every query [(row, score), ..], best first."""
    import torch

    device, found = "cuda" if torch.cuda.is_available() else "cpu", []
    for first in range(0, len(queries), 64):
        # Always 64 rows, so that a query's scores do not depend on how many others there are, to the last bit.
        block = torch.zeros(64, queries.shape[1], device=device)
        block[: len(queries) - first] = queries[first : first + 64].to(device)
        scores, rows = torch.empty(64, 0, device=device), torch.empty(64, 0, dtype=torch.long, device=device)
        for start in range(0, len(vectors), 1 << 16):
            part = block @ vectors[start : start + (1 << 16)].to(device).float().T  # [64, vectors of the block]
            scores = torch.cat([scores, part], 1)
            rows = torch.cat([rows, torch.arange(start, start + part.shape[1], device=device).expand(64, -1)], 1)
            scores, best = scores.topk(min(k, scores.shape[1]))  # [64, k]
            rows = rows.gather(1, best)
        found += [list(zip(*pair)) for pair in zip(rows.tolist(), scores.tolist())][: len(queries) - first]
    return found


def _ask_server(url, queries, k):
    """Search-R1's contract: one request for all queries. Trouble on the way is tried again, a refusal (4xx) is not."""
    if not queries:
        return []
    body = json.dumps({"queries": list(queries), "topk": k, "return_scores": True}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    for wait in (*RETRY_SECONDS, None):
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as reply:
                result = json.load(reply)["result"]
            if len(result) != len(queries):
                raise ValueError(f"{len(result)} results for {len(queries)} queries")
            return [[{**passage(url, hit["document"]), "score": hit["score"]} for hit in hits] for hits in result]
        except urllib.error.HTTPError as error:
            if 400 <= error.code < 500 and error.code != 429:
                raise DataError(f"{url} refuses the request ({error}); does it keep Search-R1's contract?") from None
            trouble = error
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:  # down, late, cut off, not JSON
            trouble = error
        if wait is not None:
            time.sleep(wait)
    attempts = len(RETRY_SECONDS) + 1
    raise DataError(f"{url}: no answer after {attempts} attempts ({_one_line(trouble)}); start the server, then go on with --resume")


# ---- Command line ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_or_nothing(path):
    """A temporary path on the same disk, renamed to `path` at the end, deleted on failure: never half an output."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        yield Path(folder) / path.name
        try:
            os.replace(Path(folder) / path.name, path)
        except OSError:
            if not path.is_dir():  # else another process made the same index meanwhile
                raise


def refuse(out):
    if os.path.exists(out):
        raise DataError(f"--out {out}: is there already; choose another name or delete it")


class _Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, where argparse prints the whole usage before it
        raise DataError(f"{message}; see {self.prog} --help")


def main(argv=None):
    parser = _Parser(prog="data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    p = commands.add_parser("build", help="make masked documents from a corpus", allow_abbrev=False)
    p.add_argument("--corpus", required=True, help="file, folder or Hub data set of passages or articles")
    p.add_argument("--out", required=True, help="new folder for the documents")
    p.add_argument("--documents", type=_at_least(1), required=True, help="training documents")
    p.add_argument("--heldout", type=_at_least(0), help="held-out documents besides (a tenth of --documents, at most 128)")
    p.add_argument("--related", type=_at_least(0), default=29, help="passages related to the pivot (29)")
    p.add_argument("--random", type=_at_least(0), default=120, help="random passages (120)")
    p.add_argument("--ner", default="en_core_web_sm", help="spaCy pipeline, or rules: no download, coarser (en_core_web_sm)")
    p.add_argument("--encoder", default="bm25", help="what related means: bm25, or a transformers encoder (bm25)")
    p.add_argument("--passage_words", type=_at_least(1), default=160, help="words of a passage cut from an article (160)")
    p.add_argument("--max_passages", type=_at_least(0), default=300_000, help="passages of the corpus, 0: all; some 5 kB of memory each (300000)")
    p.add_argument("--min_passages", type=_at_least(1), default=1, help="passages that hold the answer, the pivot included (1)")
    p.add_argument("--processes", type=_at_least(1), default=os.cpu_count(), help="processes that look for entities (all cores)")
    p.add_argument("--seed", type=int, default=0)
    p.set_defaults(run=build)

    p = commands.add_parser("show", help="print one document as the agent sees it", allow_abbrev=False)
    p.add_argument("dir", help="folder that build wrote")
    p.add_argument("--tokenizer", help="model whose tokenizer cuts the chunks (without: about as many words)")
    p.add_argument("--chunk_tokens", type=_at_least(1), default=5120)
    p.add_argument("--split", choices=("train", "heldout"), default="train")
    p.add_argument("--document", type=int, default=0, help="its number, from 0")
    p.add_argument("--seed", type=int, default=0, help="of the recall that is shown")
    p.set_defaults(run=show)

    p = commands.add_parser("longqa", help="make long documents from questions with paragraphs", allow_abbrev=False)
    p.add_argument("--questions", required=True, help="questions with context [[title, text], ..]")
    p.add_argument("--out", required=True, help="new file: .jsonl, .jsonl.gz or .json (MemAgent's eval format)")
    p.add_argument("--documents", type=_at_least(1), default=200, help="paragraphs of a long document (200: about 28k tokens)")
    p.add_argument("--seed", type=int, default=0)
    p.set_defaults(run=longqa)

    try:
        args = parser.parse_args(argv)
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # show DIR | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (DataError, OSError) as error:  # OSError: a full disk, a folder without permission
        print(f"error: {error}", file=sys.stderr)
        return 2


def _at_least(minimum):
    def number(text):
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text} is less than {minimum}")
        return int(text)

    return number


if __name__ == "__main__":
    sys.exit(main())
