"""Checks of tensors that were read from a file: their dtypes and layouts, and whether their numbers are finite."""

import torch

from device import name_of

FLOATS = torch.float32, torch.bfloat16, torch.float16, torch.float64
INTEGERS = torch.int8, torch.uint8  # of quantized matrices


class NotFinite(ValueError):
    """A tensor holds nan or infinity: its file is damaged, and whatever is computed with it will be nan."""


def check_tensor(name, x, dtypes=FLOATS):
    """Raises ValueError where x is not a tensor of one of these dtypes on the CPU, with its numbers one by one."""
    if not isinstance(name, str) or not isinstance(x, torch.Tensor):
        raise ValueError(f"{name!r:.60} is a {type(x).__name__}, where tensors by name were expected")
    if x.dtype not in dtypes:
        readable = ", ".join(map(name_of, dtypes))
        raise ValueError(f"tensor {name} is {name_of(x.dtype)}: only {readable} are read")
    if x.layout is not torch.strided or x.is_nested or x.device.type != "cpu":
        kind = f"{name_of(x.layout)}, on {x.device}"
        raise ValueError(f"tensor {name} ({kind}) does not hold its numbers one by one")


def count_stored_numbers(tensors):
    """Returns how many numbers the memory of tensors holds, which is no more than their file has.

    A tensor that repeats itself (stride 0) or is on the meta device claims more elements than that.
    """
    counts = {}
    for x in tensors:
        if x.device.type == "cpu":
            storage = x.untyped_storage()
            counts[storage.data_ptr()] = storage.nbytes() // x.element_size()
    return sum(counts.values())


def is_finite(x):
    """Returns whether all numbers of a tensor are finite in float32.

    A number that is not would make the sum not finite either, and a sum takes one pass and no second tensor.
    A sum may also overflow, so where it is not finite each number is looked at.
    """
    x = x.detach().float()
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


def find_not_finite(tensors):
    """Returns the name of the first tensor that is not finite, or None."""
    return next((name for name, x in tensors.items() if not is_finite(x)), None)


def check_finite(tensors):
    """Raises NotFinite, which names the first tensor that is not finite."""
    name = find_not_finite(tensors)
    if name is not None:
        advice = "take an earlier copy, or train anew"
        raise NotFinite(f"tensor {name} holds nan or infinity, in float32; {advice}")


def check_tensors(tensors, dtypes):
    """Raises ValueError where tensors by name are not of these dtypes, and all finite."""
    for name, x in tensors.items():
        check_tensor(name, x, dtypes)
    # twice, as a head may be the embedding too; without a bound a tiny file could be summed for hours
    if sum(x.numel() for x in tensors.values()) > 2 * count_stored_numbers(tensors.values()):
        raise ValueError("its tensors have more numbers than it holds")
    check_finite(tensors)
