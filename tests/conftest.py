"""Shared by the tests: small models, a tokenizer, the pocket world; made here, not downloaded."""

import copy
import os
import signal
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network; before transformers is imported
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # nor a GPU; before torch is

import pytest
import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)
# no deadline: machines differ in speed
settings.register_profile("memtrain", deadline=None, derandomize=True, max_examples=60)
settings.register_profile("thorough", deadline=None, max_examples=25_000)
settings.load_profile("memtrain")

CHAT_TEMPLATE = (  # Qwen's form, with its switch for thinking
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
QWEN_WORDS = (  # the pattern that Qwen's tokenizers split text by
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
VOCABULARY = 64


def tiny_model(architecture="qwen3", seed=0, **config):
    """Two layers, four query heads on two key heads; called twice, it gives two equal models."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    sizes |= dict(
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512
    )
    sizes |= dict(initializer_range=0.2, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(architecture, **{**sizes, **config})
        )
        # biases and norms start at 0 and 1, which would hide mistakes
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE with Qwen's word pattern and chat template; `</think>` is an added token
    that is not special, `<|reserved|>` a special one without a role (Llama 3 has hundreds)."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from rollout import NO_MEMORY, PROBLEM, TEMPLATES

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    core.train_from_iterator([NO_MEMORY, PROBLEM, *TEMPLATES.values()], trainer)
    core.add_tokens(
        [AddedToken(token, normalized=False, special=False) for token in ("<think>", "</think>")]
    )
    core.add_special_tokens(["<|reserved|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def pocket_model(tmp_path_factory):
    """The pocket world as `python tests/pocket.py` writes it: the path of its model folder."""
    import pocket

    folder = tmp_path_factory.mktemp("world") / "pocket"
    pocket.make(str(folder))
    return str(folder / "model")


@pytest.fixture
def alone():
    """A process group of this process alone, as train.py makes it; gives the device."""
    import distributed

    yield distributed.start_ranks()
    torch.distributed.destroy_process_group()


@pytest.fixture
def signals():
    """Gives the process its signal handlers back: train() takes them for good."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def longest_turn(prompts, problem, **settings):
    """train.longest_turn for a question that is given as ids."""
    import train

    prompts = copy.copy(prompts)
    prompts.problem = problem  # that of rows without a question of their own
    setup = train.Setup(train.Config(**settings), prompts, None)
    return train.longest_turn(setup, [{"question": None}])
