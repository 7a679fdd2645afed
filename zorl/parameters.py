"""The parameters that a run tunes: which they are, how an update reaches them, and their fingerprint."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from zorl.directions import Distribution, Key, Step, canonical_name, canonical_names, key
from zorl.kernels import kernel_for
from zorl.kernels.reference import add_dense
from zorl.offload import can_be_written, named_stored
from zorl.quantization import is_plain


class ParameterSet(Mapping[str, Tensor]):
    """Tensors by canonical name. The order in which they are given does not matter: iteration is sorted by name.

    Args:
        named: (name, tensor) pairs, as from `model.named_parameters()`. Tied weights appear once, under their first name.

    Raises:
        ValueError: there are none, two share a canonical name, or one holds NaN or infinity.
        TypeError: a dtype that cannot be tuned.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]]) -> None:
        unique: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in named:
            unique.setdefault(id(tensor), (name, tensor))
        if not unique:
            raise ValueError("there are no parameters to tune: the list is empty")
        names = canonical_names(name for name, _ in unique.values())
        self._tensors = dict(sorted(zip(names, (tensor for _, tensor in unique.values()), strict=True)))
        for name, tensor in self._tensors.items():
            kernel_for(tensor)  # raises for dtypes and sizes without a kernel
            if not torch.isfinite(tensor.detach()).all():
                bad = int((~torch.isfinite(tensor.detach())).sum())
                raise ValueError(f"parameter {name!r} holds {bad} NaN or infinite values of {tensor.numel()}")

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def numel(self) -> int:
        return sum(tensor.numel() for tensor in self._tensors.values())

    @property
    def dtypes(self) -> set[torch.dtype]:
        return {tensor.dtype for tensor in self._tensors.values()}

    def add(self, steps: Sequence[Step], distribution: Distribution) -> None:
        """θ ← θ + Σ cᵢ·z(seedᵢ), in order. Only this and `change` write θ.

        Each block of θ is brought into cache once for all the steps, so a long replay runs at cache speed.
        """
        for name, tensor in self._tensors.items():
            coefficients = [step.coefficient_of(name) for step in steps]
            kernel_for(tensor).add(tensor, [key(step.seed, name) for step in steps], coefficients, distribution)

    def change(self, name: str, amount: Tensor, stream: Key) -> None:
        """Adds a tensor to a parameter, rounded as `add` rounds; half precision takes its random bits from the stream."""
        add_dense(self._tensors[name], amount, stream)

    def names(self) -> dict[int, str]:
        """Canonical names by the identity of tensors, and by the address of their first element."""
        by_address = {tensor.data_ptr(): name for name, tensor in self._tensors.items() if tensor.numel()}
        return by_address | {id(tensor): name for name, tensor in self._tensors.items()}

    def describe(self) -> list[tuple[str, list[int], str]]:
        """(canonical name, shape, dtype) of each, sorted by name."""
        return [(name, list(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in self._tensors.items()]

    def sha256(self) -> str:
        """The SHA-256 of the names, shapes, dtypes and bytes of all tensors."""
        return tensors_sha256(self._tensors)


def plain_parameters(model: nn.Module) -> list[tuple[str, Tensor]]:
    """All parameters but quantised weights, as (name, tensor) pairs: those of any model that `ParameterSet` accepts.

    For offloaded parameters, the tensors that they are brought in from.
    """
    return [(name, values) for name, p, values in named_stored(model) if is_plain(p)]


def base_sha256(model: nn.Module) -> str:
    """SHA-256 of a model's parameters, by canonical name.

    Quantised weights are left out: their bits depend on the quantiser and the device, and the rest (embeddings,
    norms, biases, the adapter) identifies the checkpoint.
    """
    plain = plain_parameters(model)
    names = canonical_names(name for name, _ in plain)
    return tensors_sha256(dict(zip(names, (p for _, p in plain), strict=True)))


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of named tensors: independent of their order, device and memory layout."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous().cpu()
        digest.update(f"{name}:{list(tensor.shape)}:{tensor.dtype};".encode())
        if tensor.numel():
            digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def select(model: nn.Module, patterns: Sequence[str] | str | None = None) -> list[tuple[str, Tensor]]:
    """The parameters with `requires_grad`, or those of them whose canonical name matches a shell-style pattern.

    Args:
        patterns: such as `"*.bias"` or `["*norm*", "lm_head.*"]`; None selects all.

    Returns:
        (name, tensor) pairs. For offloaded parameters, the tensors that they are brought in from.

    Raises:
        ValueError: nothing requires a gradient, a pattern matches nothing, or a parameter lies on disk.
    """
    trainable = [(name, values) for name, p, values in named_stored(model) if p.requires_grad]
    if not trainable:
        raise ValueError("no parameter of the model has requires_grad=True, so there is nothing to tune")
    if patterns is None:
        return _writable(model, trainable)
    chosen: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matches = {name for name, _ in trainable if fnmatch.fnmatchcase(canonical_name(name), pattern)}
        if not matches:
            some = ", ".join(repr(canonical_name(name)) for name, _ in trainable[:3])
            raise ValueError(
                f"the pattern {pattern!r} matches none of the {len(trainable)} parameters (such as {some})"
            )
        chosen |= matches
    return _writable(model, [(name, values) for name, values in trainable if name in chosen])


def _writable(model: nn.Module, chosen: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    for name, _ in chosen:
        path, _, attribute = name.rpartition(".")
        if not can_be_written(model.get_submodule(path), attribute):
            raise ValueError(
                f"{name!r} is offloaded to disk, where it is only read: tune an adapter on the model (tune='lora' or 'prefix'), "
                "or offload to the CPU"
            )
    return chosen
