"""What several GPUs take: ranks, sharding with FSDP2, the memory for a rollout, checkpoints.

torchrun starts the ranks; a process by itself is a world of one, and runs the same code:

    device = start_ranks()                joins torchrun's process group, or makes one
    policy = shard(policy, device)        fp32 master weights, divided over all ranks
    with gathered(policy): ...            inside, every rank holds the whole model
    values = all_gather(value)            the values of all ranks, in their order
    save_checkpoint(...), load_trainer(...)

It imports none of its siblings: copy it as it is (torch 2.11 to 2.13, transformers 5.17 to 5.23).
"""

import contextlib
import datetime
import os
import shutil
import signal
import sys
import time
from collections import OrderedDict
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

# ----------------------------------------------------------------------------------------- ranks


def start_ranks():
    """Joins torchrun's process group, or makes one of this process alone. -> this rank's device"""
    from transformers.utils import logging

    logging.disable_progress_bar()  # there is one bar, ours
    device = torch.device("cpu")
    if torch.cuda.is_available():
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)

    # torchrun starts its ranks again on the same store, where the addresses of dead ones stand
    store, rank, world = dist.HashStore(), 0, 1
    if "RANK" in os.environ:
        store, rank, world = next(dist.rendezvous("env://"))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        store = dist.PrefixStore(f"attempt {attempt}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    patience = datetime.timedelta(days=7)  # ranks wait for the longest rollout, or evaluation
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)
    return device


rank, world_size = dist.get_rank, dist.get_world_size


def all_gather(value):
    """The values of all ranks (anything that can be pickled), in the order of ranks."""
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def leave():
    """Takes the process group apart; a rank of torchrun's ends here, with status 0.

    Python must not take such a process apart: gloo's threads may hold the last tensors yet, and
    abort it then (pytorch 179291), so that a run that is done would end as one that failed."""
    dist.destroy_process_group()
    if "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


@contextlib.contextmanager
def one_line_errors(*kinds):
    """What can't be read, written or held (OSError, MemoryError), and errors of these kinds, end in
    one line and status 2. A rank that fails just leaves, and torchrun ends the others: to take the
    process group apart it would have to wait for them."""
    try:
        yield
    except (OSError, MemoryError, torch.OutOfMemoryError, *kinds) as error:
        if isinstance(error, torch.OutOfMemoryError):
            cure = "lower --tokens_per_forward if in the update, --kv_tokens if in the rollout"
            error = f"the GPU's memory is full: {cure} ({str(error).splitlines()[0]})"
        if int(os.environ.get("RANK", 0)):
            time.sleep(5)  # where all ranks fail, rank 0 speaks, and the others are ended by then
        tqdm.write(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized() and world_size() == 1:
            dist.destroy_process_group()
    if dist.is_initialized():
        leave()


def note_signals():
    """From now on Ctrl-C and SIGTERM are only noted, in the list that this gives, so that a step
    can be finished and saved. A second one acts as ever, but under torchrun, which passes on one of
    its own beside the terminal's, and kills after 30 seconds."""
    noted = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number, frame):
        noted.append(number)
        if "RANK" not in os.environ:
            signal.signal(number, before[number])

    for number in before:
        signal.signal(number, note)
    return noted


# -------------------------------------------------------------------------------------- sharding


def compute_dtype(device):
    """What a model computes in, and its cache and checkpoints hold."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def shard(policy, device, master=True):
    """FSDP2 over all ranks: fp32 shards, the master copy, computing in compute_dtype, gradients
    reduced in fp32. Where no master copy is wanted, nothing is trained, and a single rank keeps the
    plain model; a single CPU always does. policy: a module whose forward takes turns, with the
    transformers model as `.lm`."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers.modeling_layers import GradientCheckpointingLayer

    dtype = compute_dtype(device)
    if not master:  # parameter by parameter: RoPE's buffers stay fp32
        for parameter in policy.parameters():
            parameter.data = parameter.data.to(dtype)
    if world_size() == 1 and (dtype == torch.float32 or not master):
        return policy.to(device)
    mesh = dist.init_device_mesh(device.type, (world_size(),))
    precision = MixedPrecisionPolicy(
        param_dtype=dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # layers receive what layers gave
    )
    for layer in policy.lm.modules():
        if isinstance(layer, GradientCheckpointingLayer):  # wherever a model keeps its layers
            fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(policy, mesh=mesh, mp_policy=precision)
    policy.to(device)  # buffers
    if master:
        policy.float()

    # weights stay gathered through a whole rollout and a whole update, see `gathered`
    policy.set_reshard_after_forward(False, recurse=True)
    policy.set_reshard_after_backward(False, recurse=True)
    with torch.no_grad():
        policy([[0]], [[0]])  # the root must run once before `generate` enters below it
    for unit in _fsdp_units(policy):
        unit.reshard()
    return policy


@contextlib.contextmanager
def gathered(policy):
    """Inside, every rank holds the whole model, so that `generate` and training rows run without
    gathering it layer by layer. Ranks wait for each other at the end."""
    units = _fsdp_units(policy)
    for unit in units:
        unit.unshard()
    # Where no gradients are wanted, FSDP's hooks have nothing left to do, and would cost 0.3 ms of
    # a CPU a layer and token.
    hooks = []
    if not torch.is_grad_enabled():
        torch.cuda.empty_cache()  # an update's blocks are of other sizes; nothing on a CPU
        for unit in units:
            hooks.append((unit, unit._forward_pre_hooks, unit._forward_hooks))
            unit._forward_pre_hooks, unit._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for unit, before, after in hooks:
            unit._forward_pre_hooks, unit._forward_hooks = before, after
    dist.barrier()
    for unit in units:
        unit.reshard()  # the gathered weights are stale after an optimizer step


def _fsdp_units(policy):
    """The modules that FSDP shards, each by itself; none where the model is plain."""
    from torch.distributed.fsdp import FSDPModule

    return [module for module in policy.modules() if isinstance(module, FSDPModule)]


def kv_budget(lm, device, trained=True):
    """Tokens of KV cache for a rollout: three quarters of what the fullest rank has free once the
    weights are gathered and, where it is `trained`, gradients and optimizer state exist (12 bytes a
    parameter, sharded). On a CPU: 131072."""
    if device.type == "cpu":
        return 2**17
    width = compute_dtype(device).itemsize
    parameters = sum(parameter.numel() for parameter in lm.parameters())
    taken = 12 * parameters // world_size() if trained else 0
    if trained or _fsdp_units(lm):
        taken += width * parameters  # else they are there already
    torch.cuda.empty_cache()  # what PyTorch holds without using it would count as taken
    free = min(all_gather(torch.cuda.mem_get_info(device)[0])) - taken
    if free <= 0:
        raise MemoryError(
            f"the model leaves no memory for a rollout ({-free / 1e9:.1f} GB short on a GPU): "
            "use more GPUs, or a smaller model"
        )
    config = lm.config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    heads = getattr(config, "num_key_value_heads", None) or heads  # of keys; older models: all
    return int(0.75 * free / (2 * width * config.num_hidden_layers * heads * size))


# ----------------------------------------------------------------------------------- checkpoints


def checkpoints(run):
    """The folders of a run's checkpoints, oldest first."""
    return sorted(Path(run).glob("step-*[0-9]"))


def checkpoint_path(model):
    """A run's folder stands for its newest checkpoint; anything else for itself."""
    saved = checkpoints(model)
    return str(saved[-1]) if saved else model


def load_model(path, dtype):
    """-> (causal language model on the CPU, tokenizer), of a Hub name or a folder.

    dtype "auto": as the weights lie in the files, which are then only mapped into memory."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    path = checkpoint_path(path)
    try:
        config = AutoConfig.from_pretrained(path)
        if getattr(config, "quantization_config", None):
            raise ValueError("its weights are quantized, and can't be trained: use the plain ones")
        tokenizer = AutoTokenizer.from_pretrained(path)
        if not tokenizer.is_fast:
            raise ValueError("its tokenizer has no tokenizer.json, hence no offsets: convert it")
        if not tokenizer("a", add_special_tokens=False)["input_ids"]:
            raise ValueError("its tokenizer knows no words: a file is missing")
        config.dtype = None  # "auto" would believe the config rather than the files
        lm, report = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, output_loading_info=True
        )
        if report["missing_keys"]:  # transformers draws them at random
            raise ValueError(f"it lacks weights: {', '.join(sorted(report['missing_keys']))[:200]}")
        return lm, tokenizer
    except Exception as error:  # a folder of somebody's: its files may lack or hold anything
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        what = "not a folder with a checkpoint to train, nor such a model of the Hub"
        raise OSError(f"--model {path}: {what} ({reason})") from None


def save_checkpoint(out, step, policy, optimizer, tokenizer, keep=2, files=None):
    """out/step-NNNNNN/: the model in Hugging Face format, `files` {name: text} beside it, and
    trainer/ with fp32 weights, optimizer and step (torch.distributed.checkpoint).

    Written to another name, then renamed, so that a folder of that name is whole. The last `keep`
    stay. OSError where it can't be written; the earlier ones are intact then.
    """
    import torch.distributed.checkpoint as dcp
    from safetensors import SafetensorError
    from torch.distributed.checkpoint.state_dict import StateDictOptions
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict

    final, partial = Path(out, f"step-{step:06d}"), Path(out, "step.partial")
    if rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()

    # every rank writes its shards, rank 0 the whole model
    model, optim = get_state_dict(policy, optimizer)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = get_model_state_dict(policy, options=options)
    state = {"model": model, "optimizer": optim, "step": step}
    trouble = None
    try:
        dcp.save(state, checkpoint_id=str(partial / "trainer"))
        if rank() == 0:
            _save_pretrained(policy.lm, whole, partial)
            tokenizer.save_pretrained(partial)
            for name, text in (files or {}).items():
                (partial / name).write_text(text)
    except dcp.api.CheckpointException as error:
        trouble = str(next(iter(error.failures.values()))[0])
    except (OSError, SafetensorError) as error:
        trouble = str(error)
    troubles = [text.splitlines()[0] for text in all_gather(trouble) if text]
    if troubles:
        free = shutil.disk_usage(out).free / 1e9
        raise OSError(
            f"{final} could not be saved ({troubles[0]}; {free:.1f} GB free); earlier checkpoints "
            "are intact: make room, then --resume"
        )

    # all is there: give it its name
    if rank() == 0:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in checkpoints(out)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def _save_pretrained(lm, weights, folder):
    """The Hugging Face checkpoint, in the dtype that the model computes in. A fresh model on no
    device carries the weights, so that its config names their dtype and tied ones are one file."""
    dtype = compute_dtype(lm.device)
    with torch.device("meta"):
        plain = type(lm)(lm.config)
    own = {name.removeprefix("lm."): value.to(dtype) for name, value in weights.items()}
    plain.load_state_dict(own, assign=True, strict=False)
    plain.tie_weights()
    plain.generation_config = lm.generation_config
    plain.save_pretrained(folder)


def load_trainer(run, policy, optimizer):
    """Puts the weights and optimizer state of a run's newest checkpoint back, on any number of
    ranks; one that can't be read is named, and the one before it is used. -> its step; 0 where the
    run has none. OSError where none can be read."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    saved = checkpoints(run)
    for folder in reversed(saved):
        model, optim = get_state_dict(policy, optimizer)
        state = {"model": model, "optimizer": optim, "step": 0}
        trouble = None
        try:
            dcp.load(state, checkpoint_id=str(folder / "trainer"))
        except (dcp.api.CheckpointException, OSError, RuntimeError, ValueError) as error:
            trouble = str(error).splitlines()[0]
        if any(all_gather(trouble)):
            if rank() == 0:
                print(f"note: {folder} can't be read; the one before it is used", file=sys.stderr)
            continue
        set_state_dict(
            policy, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        return state["step"]
    if saved:
        raise OSError(f"--resume: no checkpoint in {run} can be read; start in another folder")
    return 0
