"""A real pretrained chat model and a real spaCy pipeline, where MEMTRAIN_REAL names a folder with
smollm2/ (SmolLM2-135M-Instruct as a Hugging Face folder), site/ (with en_core_web_sm) and, where
they are wanted, Qwen's prompts: qwen/ (any Qwen2.5 that is instruction-tuned)."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import distributed
import grpo
import train
from rollout import Prompts, Sampler

REAL = Path(os.environ.get("MEMTRAIN_REAL", "nowhere"))
pytestmark = pytest.mark.skipif(
    not (REAL / "smollm2").exists(), reason="set MEMTRAIN_REAL to a folder with smollm2/ and site/"
)

SYSTEM = {
    "smollm2": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "qwen": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
}
UPDATE = """<|im_end|>
<|im_start|>user
You are reading a long article section by section, and only your memory passes from one section to \
the next. Read the section below and write the updated memory: keep what the old memory says that \
may still be needed, add what the section says that helps with the problem, and keep other facts \
(names, places, numbers, dates) that may be asked for later. Be concise, and write nothing but the \
memory.

<problem>
Who built it?
</problem>

<memory>
No previous memory
</memory>

<section>
The mill was built by Peta Holt.
</section>

Updated memory:
<|im_end|>
<|im_start|>assistant
"""
PASSAGES = [
    ("Ada Lovelace worked with Charles Babbage in London in 1843.", {"Ada Lovelace", "London"}),
    ("In 1998 Google was founded in California by Larry Page.", {"California", "Larry Page"}),
    ("Marie Curie was born in Warsaw, then moved to Paris.", {"Marie Curie", "Warsaw", "Paris"}),
    # of Wikipedia
    ("In 2006 the WHO reversed a longstanding policy against DDT by recommending that it be used "
     "as an indoor pesticide.", {"2006", "WHO", "DDT"}),
    ("In February 2013, Venezuela devalued its currency.", {"February 2013", "Venezuela"}),
    ("The Montgomery Convention to establish the Confederacy and its executive met February 4, "
     "1861.", {"Montgomery Convention", "February 4, 1861"}),
    ("Its growth was encouraged when the country's former head of state, Hastings Kamuzu Banda, "
     "established it as Malawi's new capital city.", {"Hastings Kamuzu Banda", "Malawi"}),
    ("They then lost the AFC Championship to the Steelers, who went on to win the Super Bowl.",
     {"AFC Championship", "Steelers", "Super Bowl"}),
    ("Alessandro Volta also drew admiration from Napoleon Bonaparte for his invention, and was "
     "invited to the Institute of France.", {"Napoleon Bonaparte", "Institute of France"}),
    ("Two contemporaries, Thomas Brattle and Robert Calef, place him at executions.",
     {"Thomas Brattle", "Robert Calef"}),
]  # fmt: skip


@pytest.fixture(scope="module")
def smollm2():
    return distributed.load_model(str(REAL / "smollm2"), torch.float32)


@pytest.mark.parametrize("name", SYSTEM)
def test_a_prompt_is_what_a_person_would_have_typed(name):
    if not (REAL / name).exists():
        pytest.skip(f"{REAL} holds no {name}/")
    tokenizer = AutoTokenizer.from_pretrained(REAL / name)
    prompts = Prompts(tokenizer)
    section = prompts.encode("The mill was built by Peta Holt.")
    problem = prompts.encode("Who built it?")
    ids = prompts.update(problem=problem, memory=prompts.no_memory, section=section)
    assert tokenizer.decode(ids) == f"<|im_start|>system\n{SYSTEM[name]}{UPDATE}"
    assert prompts.ends == {tokenizer.eos_token_id} and prompts.thinks is None


def test_training_scores_what_was_sampled_and_greedy_is_what_transformers_writes(smollm2):
    lm, tokenizer = smollm2
    prompts, policy = Prompts(tokenizer), grpo.Policy(lm)
    assert policy.shares
    asked = []
    for question in ("What is the capital of France?", "Name a colour.", "What is 2 + 2?"):
        asked.append(prompts.closed_book(problem=prompts.encode(question)))
    sampler = Sampler(lm, prompts.ends)
    responses = sampler(asked, [24] * 3, [(0, 0), (0, 1), (0, 2)])
    with torch.no_grad():
        trained = policy(asked, [response.ids for response in responses])
    for response, logps in zip(responses, trained):
        assert (logps - torch.tensor(response.logps)).abs().max() < 1e-4

    greedy = Sampler(lm, prompts.ends, temperature=0)(asked[:1], [24], [(0,)])[0].ids
    whole = torch.tensor(asked[:1])
    plain = lm.generate(
        whole,
        attention_mask=torch.ones_like(whole),
        max_new_tokens=24,
        do_sample=False,
        repetition_penalty=1.0,
    )
    assert plain[0, len(asked[0]) :].tolist() == greedy


def test_a_real_model_takes_a_step_and_its_checkpoint_loads(tmp_path, monkeypatch, signals):
    monkeypatch.chdir(tmp_path)
    text = "The mill of Arlen was built in 1811 by Peta Holt, a carpenter from Dunby. " * 4
    row = {"question": "Who built the mill?", "answers": ["Peta Holt"], "context": text}
    Path("q.jsonl").write_text(json.dumps(row) + "\n")
    flags = f"--task longqa --model {REAL / 'smollm2'} --data q.jsonl --steps 1 --group 2"
    flags += " --documents_per_step 1 --chunk_tokens 64 --memory_tokens 8 --answer_tokens 8"
    train.main(f"{flags} --no-filter --out run".split())
    [line] = train.read_metrics("run")
    assert line["mismatch_max"] < 1e-4 and line["ratio"] == pytest.approx(1)
    lm = AutoModelForCausalLM.from_pretrained("run/step-000001")
    assert lm.config.dtype == torch.float32 and lm.num_parameters() == 134_515_008


def test_the_default_pipeline_finds_the_entities_of_real_sentences(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(REAL / "site"), *sys.path])
    found = data.find_entities([text for text, _ in PASSAGES], "en_core_web_sm")
    for (text, names), spans in zip(PASSAGES, found, strict=True):
        assert names <= {text[start:end] for start, end in spans}
