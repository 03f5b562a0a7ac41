"""A whole step on a GPU that is not there: tensors say they lie on it and mix with no CPU tensors.

As a script (a process of its own, since torch knows the device from then on):
python test_devices.py bfloat16
"""

import contextlib
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from conftest import tiny_model
from test_train import Recorder
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

import distributed
import grpo
import train
from rollout import Agent, Sampler, rollout


class OnDevice(torch.Tensor):
    """Holds its numbers in a tensor of the CPU, and says that they lie on the GPU."""

    is_cuda = property(lambda self: True)  # so that the code goes the way that it goes on CUDA

    @staticmethod
    def __new__(cls, held):
        gpu = torch.device("gpu", 0)
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=gpu
        )
        wrapper.held = held
        return wrapper

    def __repr__(self, **_):
        return f"OnDevice({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Backend:
    """What torch asks a kind of device for; it has one."""

    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    is_initialized = is_available = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    get_rng_state = staticmethod(lambda device=0: torch.empty(0))
    set_rng_state = staticmethod(lambda state, device=0: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])
    device = staticmethod(lambda device: contextlib.nullcontext())


class Device(TorchDispatchMode):
    """Inside, device="gpu" gives such tensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Literals(TorchFunctionMode):
    """Lists go to a device, and come from there, in ways that no dispatch mode sees."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.tolist:
            return func(args[0].cpu())
        device = kwargs.pop("device", None) if func is torch.tensor else None
        result = func(*args, **kwargs)
        return result if device is None else result.to(device)


def run(func, args, kwargs):
    """An operation on the tensors that are held; one that mixes devices is refused."""
    name = func.name()
    tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, torch.Tensor)]
    away = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    home = [tensor for tensor in tensors if not isinstance(tensor, OnDevice) and tensor.dim()]
    if away and home and not name.startswith(("aten::_to_copy", "aten::copy_")):
        raise RuntimeError(f"{name}: tensors on the GPU and on the CPU")

    # run it on the CPU
    wanted = kwargs.get("device")
    settings = dict(kwargs) if wanted is None else dict(kwargs, device="cpu")
    args_held, held = tree_map(lambda x: x.held if isinstance(x, OnDevice) else x, (args, settings))
    if name == "aten::mm.dtype":  # bf16 in, fp32 out: on GPUs alone
        result = args_held[0].float() @ args_held[1].float()
    else:
        result = func(*args_held, **held)

    # its result lies where it was wanted, or where its inputs lie
    if func._schema.is_mutable:
        return args[0] if func._schema.returns else None
    there = bool(away) if wanted is None else torch.device(wanted).type == "gpu"
    if name == "aten::_local_scalar_dense" or not there:
        return result
    return tree_map(lambda x: OnDevice(x) if isinstance(x, torch.Tensor) else x, result)


def to_device(model):
    """Moves a model's parameters and buffers."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(OnDevice(parameter.data))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = OnDevice(buffer)
    model.tie_weights()


class Writer(Agent):
    """Two turns, the second after what the first wrote."""

    def __init__(self, ids, key):
        super().__init__(key)
        self.ids = ids

    def prompt(self):
        return (self.ids, 12) if len(self.turns) < 2 else None

    def receive(self, ids):
        self.ids = self.ids + ids


def step(policy, reference):
    """Rollout, log-probs of its policy and of the reference, loss and backward of two updates."""
    agents = [
        Writer([5, 6, 7, 8, 9, document] + [i] * (i > 1), (document, i))
        for document in (0, 1)
        for i in range(4)
    ]
    rollout(agents, Sampler(policy.lm, [63], segment=4, temperature=0.7))
    sequences = []
    for number, agent in enumerate(agents):
        sequences += [train.Sequence(turn, (-1.0) ** number, number // 4) for turn in agent.turns]
    cfg = train.Config(
        tokens_per_forward=60, documents_per_step=2, documents_per_update=1, temperature=0.7
    )
    updates = train.updates_of(cfg, sequences)
    train.add_old_logps(cfg, policy, sequences)
    train.add_logps(cfg, reference, sequences, "ref_logps")
    gradients = []
    for chosen in updates:
        recorder = Recorder(policy)
        assert train.update(cfg, policy, recorder, chosen, Counter()) > 0
        gradients.append(recorder.gradient)
    return torch.cat(gradients).cpu(), [
        turn.response_ids for agent in agents for turn in agent.turns
    ]


def main(dtype):
    device = distributed.start_ranks()
    assert device.type == "cpu"
    policies = [grpo.Policy(tiny_model(seed=seed).to(dtype), shares=True) for seed in (0, 1, 0, 1)]
    # before autograd makes a queue for every device
    backend_registration._setup_privateuseone_for_python_backend("gpu", Backend())
    expected, responses = step(*policies[:2])
    with Device(), Literals():
        # the devices do not mix
        away, home = torch.ones(3, device="gpu"), torch.ones(3)
        assert away.is_cuda and (away + home.to(away.device)).tolist() == [2, 2, 2]
        for mix in (
            lambda: away + home, lambda: torch.cat([home, away]), lambda: home[away.long()],
        ):  # fmt: skip
            with pytest.raises(RuntimeError, match="the GPU and on the CPU"):
                mix()

        # nor does the step need it
        for policy in policies[2:]:
            to_device(policy.lm)
        assert policies[2].lm.device == away.device
        gradient, responses_there = step(*policies[2:])
    assert gradient.isfinite().all()
    if dtype == torch.float32:  # in bf16 rounding decides about tokens
        assert responses_there == responses
        assert (gradient - expected).norm() < 1e-5 * expected.norm()
    # done: a made-up device's threads may abort Python while it takes itself apart
    os._exit(0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_makes_every_tensor_on_the_device_of_its_model(dtype):
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch can't be told of a device")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, dtype], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    main(getattr(torch, sys.argv[1]))
