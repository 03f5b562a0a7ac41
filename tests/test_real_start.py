"""The supervised start of a pretrained model, on a model and documents that are made here."""

import random
from pathlib import Path

import pytest
import real_start
import torch
from conftest import tiny_model

import data
import distributed
import train
from rollout import Prompts

NAMES = ["Ann Stone", "Ben Hill", "Cy Marsh", "Dora Rivers"]


def document(number):
    """Four people, one of whom is masked, each in a sentence of their own."""
    rng = random.Random(number)
    sentences = [f"In {rng.randint(1700, 1999)} {name} came to the town." for name in NAMES]
    text, _ = data.mask(" ".join(sentences), NAMES[number % 4])
    spans = [(text.index(name), text.index(name) + len(name)) for name in NAMES if name in text]
    return {"id": str(number), "text": text, "answer": NAMES[number % 4], "entities": spans}


@pytest.mark.parametrize("lesson", real_start.LESSONS)
def test_the_rule_remembers_names_and_boxes_what_is_asked(lesson, tokenizer):
    sizes = real_start.SIZES | dict(chunk_tokens=40)
    prompts = Prompts(tokenizer, real_start.TEMPLATES, real_start.PROBLEM)
    setup, asked, held = train.Setup(train.Config(**sizes), prompts, None), 0, 0
    for number in range(12):
        row = document(number)
        turns = real_start.turns(setup, row, lesson, random.Random(number))
        said = [tokenizer.decode(response[:-1]) for _, response in turns]
        assert all(response[-1] == tokenizer.eos_token_id for _, response in turns)
        first, second, answer, *recalls = said
        assert answer == f"\\boxed{{{row['answer']}}}"
        for memory, (_, response) in zip((first, second), turns):
            assert len(response) <= sizes["memory_tokens"]
            names = [name for name in memory.split("; ") if data.MASK not in name]
            assert set(filter(None, names)) <= set(NAMES) - {row["answer"]}
        targets = [recall.removeprefix("\\boxed{").removesuffix("}") for recall in recalls]
        assert set(targets) <= set(NAMES) - {row["answer"]}
        asked += len(targets)
        held += sum(target in second for target in targets)
    assert asked >= 8 and (held == asked) == lesson.held


def test_it_lowers_the_loss_and_writes_a_model_that_train_py_takes(
    tokenizer, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    model = tiny_model(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained("model")
    tokenizer.save_pretrained("model")
    rows = [document(number) for number in range(80)]
    data.save_documents("docs", {"train": iter(rows), "heldout": iter(rows[:2])})
    monkeypatch.setattr(real_start, "LR", 1e-2)
    flags = "--model model --data docs --out start".split()
    with pytest.raises(SystemExit):
        real_start.main(flags)
    assert "docs: 80 documents, 232 are wanted" in capsys.readouterr().err
    lessons = [lesson._replace(documents=40) for lesson in real_start.LESSONS]
    monkeypatch.setattr(real_start, "LESSONS", lessons)
    real_start.main(flags)
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert losses[-1] < losses[0] / 2
    cfg = train.configure({"model": "start", "data": ["docs"]})
    assert cfg.memory_tokens == 40 and cfg.prompt_order == "chunk_first"
    lm, _ = distributed.load_model("start", torch.float32)
    assert lm.num_parameters() == model.num_parameters() and Path("start/memtrain.json").exists()
