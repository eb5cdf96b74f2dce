"""The state of an optimizer by the names of the parameters.

torch keeps it by number, counted over all groups, so that it fits an optimizer with the same
parameters in the same order alone. By name the parameters of one peer can be saved and loaded apart
from the others', also into an optimizer that has other peers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fastdml.errors import InputError

PER_PARAMETER = ("params", "param_names", "names")  # of a group, which hold one entry a parameter
State = dict[str, Any]  # "state": {name: {key: value}}, "groups": [{"names": [...], key: value}]


def state_by_name(optimizer: Optimizer, module: nn.Module) -> State:
    """What the optimizer holds of the parameters of `module`, under the names that they have in it;
    of each group with any of them also its values (learning rate, momentum). The tensors are the
    optimizer's own."""
    names = {id(w): name for name, w in module.named_parameters()}
    state, groups = {}, []
    for group in optimizer.param_groups:
        ours = [w for w in group["params"] if id(w) in names]
        if not ours:
            continue
        groups.append({**_values(group), "names": [names[id(w)] for w in ours]})
        state.update({names[id(w)]: dict(optimizer.state[w]) for w in ours if w in optimizer.state})
    return {"state": state, "groups": groups}


def load_by_name(
    optimizer: Optimizer, modules: Mapping[int, nn.Module], states: Mapping[int, State]
) -> None:
    """Loads what `state_by_name` gave for each of these modules, the only ones whose parameters the
    optimizer has. Raises InputError where the optimizer has other parameters than it had, or a
    group of several modules had other values in each."""
    saved: dict[str, Any] = {}
    values: dict[str, State] = {}
    for k, state in states.items():
        for group in state["groups"]:
            values.update({f"{k}.{name}": _values(group) for name in group["names"]})
        saved.update({f"{k}.{name}": found for name, found in state["state"].items()})
    names = {
        id(w): f"{k}.{name}"
        for k, module in modules.items()
        for name, w in module.named_parameters()
    }
    numbers, groups, number = {}, [], 0
    for group in optimizer.param_groups:
        known = [names[id(w)] for w in group["params"]]
        _check_same(known, values)
        taken = [values.pop(name) for name in known]
        if any(_differ(taken[0], other) for other in taken[1:]):
            raise InputError("the parameters of a group had different settings in the checkpoint")
        own = {key: value for key, value in group.items() if key != "params"}
        span = [*range(number, number + len(known))]
        groups.append({**own, **(taken[0] if taken else {}), "params": span})
        numbers.update({number + i: saved[name] for i, name in enumerate(known) if name in saved})
        number += len(known)
    if values:
        raise InputError(f"the optimizer no longer has the parameter {_shown(values)}")
    optimizer.load_state_dict({"state": numbers, "param_groups": groups})


def by_name(packed: State, modules: Mapping[int, nn.Module]) -> dict[int, State]:
    """The state of an optimizer as torch keeps it, `optimizer.state_dict()`, of these modules by
    name, where group k holds the parameters of module k that require a gradient. Raises
    InputError for another."""
    states = {}
    for k, module in modules.items():
        try:
            group = packed["param_groups"][k]
        except IndexError:
            raise InputError(f"the optimizer had {len(packed['param_groups'])} groups") from None
        names = [name for name, w in module.named_parameters() if w.requires_grad]
        if len(names) != len(group["params"]):
            raise InputError(
                f"the optimizer had {len(group['params'])} parameters of a peer that has "
                f"{len(names)}"
            )
        numbered = dict(zip(names, group["params"], strict=True))
        found = {n: packed["state"][i] for n, i in numbered.items() if i in packed["state"]}
        states[k] = {
            "state": found,
            "groups": [{**_values(group), "names": names}] if names else [],
        }
    return states


def _values(group: Mapping[str, Any]) -> State:
    """Learning rate, momentum and the like: what a group has once."""
    return {key: value for key, value in group.items() if key not in PER_PARAMETER}


def _check_same(known: Iterable[str], values: Mapping[str, State]) -> None:
    absent = [name for name in known if name not in values]
    if absent:
        raise InputError(f"the checkpoint has nothing of the parameter {_shown(absent)}")


def _shown(names: Iterable[str]) -> str:
    """The first of "K.NAME" in words."""
    k, _, name = next(iter(names)).partition(".")
    return f"{name} of peer {k}"


def _differ(a: State, b: State) -> bool:
    return a is not b and repr(a) != repr(b)
