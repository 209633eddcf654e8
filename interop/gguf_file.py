"""GGUF files, which llama.cpp, Ollama and LM Studio run: written and read by PyPI's `gguf`.

    note = write("out/ts.gguf", model, tokenizer, bits=8)
    model_config, state, tokenizer = read("out/ts.gguf")

The header is read here and not by the package, whose reader goes on past the end of a file that was cut
off. No code runs: a GGUF file holds numbers and texts. What is wrong is a ValueError or a Refusal of one line.
"""

import math
import os
import struct
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from config import Refusal
from data import AS_IT_STANDS, MODELS_OWN
from folders import in_the_way, move_aside, write_atomic
from interop import gguf_config, gguf_layout, gguf_tokenizer
from interop.chat_template import own_jinja

SUFFIX = ".gguf"
BITS = {32: "F32", 16: "F16", 8: "Q8_0", 4: "Q4_0"}
FILE_TYPES = {32: 0, 16: 1, 8: 7, 4: 2}  # llama.cpp's llama_ftype
ALWAYS_FLOAT = ("ffn_gate_inp", "position_embd")  # as in llama.cpp's own tools
LARGEST_F16 = 65504


def is_gguf(name):
    """Returns whether a name is that of a GGUF file, which need not be there."""
    return name.lower().endswith(SUFFIX)


def import_gguf(task):
    try:
        import gguf
    except ImportError:
        raise Refusal(f"{task} a GGUF file needs a library: pip install gguf")
    return gguf


# -----------------------------------------------------------------------------------------------------
# Writing


def write(path, model, tokenizer, template="", bits=32, overwrite=False, text_rule=AS_IT_STANDS):
    """Writes a model and its tokenizer; returns a note of how many tensors have which type.

    template: of a fine-tuned model, with {prompt} in it; text_rule: how it takes prompts. A file in the way is
    moved aside with overwrite. Raises Refusal, and ValueError for what llama.cpp does not have.
    """
    gguf = import_gguf("writing")
    ways = "--overwrite moves it aside"
    in_the_way(path, overwrite, ways)
    metadata, tensors = gguf_layout.to_gguf(model.config, model.state_dict())
    metadata |= gguf_tokenizer.write_tokenizer(tokenizer)
    if chat_template := find_template(tokenizer, template, text_rule):
        metadata["tokenizer.chat_template"] = chat_template
    # no general.name: llama.cpp treats special tokens by what it finds in it
    metadata |= {
        "general.type": "model",
        "general.file_type": FILE_TYPES[bits],
        "general.quantization_version": 2,
    }
    arrays = {name: convert(gguf, name, x, bits) for name, x in tensors.items()}

    def write_and_move(f):
        write_content(gguf, f.name, metadata, arrays)
        if in_the_way(path, overwrite, ways):  # also what another process has written meanwhile
            move_aside(path)

    write_atomic(path, write_and_move)
    return describe(arrays, bits)


class Written(np.ndarray):
    """An array whose tofile(), which GGUFWriter calls, writes it whole or raises an error. numpy's own does not say
    when the disk has no room for the last bytes.
    """

    def tofile(self, f):
        f.write(self)


def write_content(gguf, path, metadata, arrays):
    """Writes a file of metadata and {name: (numpy array, type)}, not atomically."""
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key != "general.architecture":
            add_value(writer, key, value)
    for name, (array, kind) in arrays.items():
        writer.add_tensor(name, array.view(Written), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def find_template(tokenizer, template, text_rule):
    """Returns the Jinja text of a model's chat template, None where it has none. template and text_rule: as write's."""
    if template in ("", MODELS_OWN):
        return tokenizer.template_source if tokenizer.files else None
    return own_jinja(tokenizer, template, text_rule)


def add_value(writer, key, value):
    adders = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    adders[type(value)](key, value)


def convert(gguf, name, x, bits):
    """Returns (numpy array, type) of a tensor in so many bits. Raises ValueError.

    Vectors, routers and position tables are float32. A row that is no multiple of a block stays float16.
    """
    array = x.detach().float().contiguous().numpy()
    kind = gguf.GGMLQuantizationType[BITS[bits]]
    if array.ndim == 1 or any(word in name for word in ALWAYS_FLOAT):
        kind = gguf.GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    if array.shape[-1] % block:
        kind = gguf.GGMLQuantizationType.F16
    if kind.name != "F32" and np.abs(array).max() > LARGEST_F16:
        raise ValueError(f"tensor {name} has numbers above {LARGEST_F16:,}, which only --bits=32 holds")
    return gguf.quantize(array, kind), kind


def describe(arrays, bits):
    """Returns a note such as "13 tensors Q8_0, 9 tensors F32"."""
    counts = {}
    for _, kind in arrays.values():
        counts[kind.name] = counts.get(kind.name, 0) + 1
    note = ", ".join(f"{count} tensors {name}" for name, count in sorted(counts.items(), reverse=True))
    odd = bits < 16 and counts.get("F16", 0)
    return note + (" (rows that are no multiple of 32 stay F16)" if odd else "")


# -----------------------------------------------------------------------------------------------------
# Reading


class Entry(NamedTuple):
    """A tensor in a file."""

    kind: object  # gguf's GGMLQuantizationType
    shape: tuple
    start: int  # bytes from the start of the file
    size: int  # bytes


MAGIC = b"GGUF"
# struct's letters of GGUF's types of values; 8 is a text, 9 a list
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, LIST = 8, 9
MOST_DIMENSIONS = 4


class Cursor:
    """A place in a file's bytes, which moves on with what is read. Raises ValueError past the end."""

    def __init__(self, data):
        self.data = data
        self.place = 0

    def take(self, size):
        if size > len(self.data) - self.place:
            raise ValueError("the file is cut off or damaged")
        start = self.place
        self.place += size
        return self.data[start : self.place]

    def number(self, letter):
        [number] = struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}")))
        return number

    def text(self):
        content = bytes(self.take(self.number("Q")))
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise ValueError(f"the text before byte {self.place:,} is not UTF-8: the file is damaged")

    def value(self, kind):
        if kind == TEXT:
            return self.text()
        if kind == LIST:
            return self.list()
        if kind not in SCALARS:
            raise ValueError(f"there is no type {kind} of values: the file is damaged")
        return self.number(SCALARS[kind])

    def list(self):
        kind, count = self.number("I"), self.number("Q")
        if kind == TEXT:
            return [self.text() for _ in range(count)]
        if kind not in SCALARS:
            raise ValueError(f"a list of type {kind} is not read here")
        size = struct.calcsize(f"<{SCALARS[kind]}")
        return list(struct.unpack(f"<{count}{SCALARS[kind]}", self.take(count * size)))


def read_header(gguf, data):
    """Returns (metadata, {name: Entry}) of a GGUF file's bytes. Raises ValueError."""
    if not MAGIC.startswith(bytes(data[:4])):
        raise ValueError("it is no GGUF file, which begins with GGUF")
    cursor = Cursor(memoryview(data))
    cursor.take(len(MAGIC))
    version = cursor.number("I")
    if version not in (2, 3):
        raise ValueError(f"its version is {version}; GGUF's versions 2 and 3 are read here")
    n_tensors, n_values = cursor.number("Q"), cursor.number("Q")
    metadata = read_metadata(cursor, n_values)
    infos = read_infos(cursor, n_tensors)
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r:.60}")
    return metadata, place_entries(gguf, infos, alignment, cursor.place, len(data))


def read_metadata(cursor, n_values):
    metadata = {}
    for _ in range(n_values):
        key = cursor.text()
        if key in metadata:
            raise ValueError(f"{key:.60} is there twice")
        metadata[key] = cursor.value(cursor.number("I"))
    if metadata.get("split.count", 1) != 1:
        raise ValueError("it is one part of several: llama.cpp's llama-gguf-split --merge joins them")
    return metadata


def read_infos(cursor, n_tensors):
    """Returns {name: (shape, type's number, offset)}. Raises ValueError."""
    infos = {}
    for _ in range(n_tensors):
        name = cursor.text()
        n_dimensions = cursor.number("I")
        if name in infos or n_dimensions > MOST_DIMENSIONS:
            raise ValueError(f"tensor {name:.60} is there twice, or has {n_dimensions} dimensions")
        shape = tuple(cursor.number("Q") for _ in range(n_dimensions))[::-1]
        infos[name] = shape, cursor.number("I"), cursor.number("Q")
    return infos


def place_entries(gguf, infos, alignment, header_size, file_size):
    """Returns {name: Entry} of {name: (shape, type's number, offset)}. Raises ValueError where the tensors do not
    follow each other, as llama.cpp wants them to, or are not all in the file.
    """
    entries = {}
    place = start = -(-header_size // alignment) * alignment
    for name, (shape, number, offset) in infos.items():
        try:
            kind = gguf.GGMLQuantizationType(number)
        except ValueError:
            raise ValueError(f"tensor {name:.60} has type {number}, which is not known here") from None
        block, block_size = gguf.GGML_QUANT_SIZES[kind]
        size = math.prod(shape) // block * block_size
        if not shape or shape[-1] % block or start + offset != place or place + size > file_size:
            raise ValueError(
                f"tensor {name:.60} is not where it has to be: the file is cut off or damaged"
            )
        entries[name] = Entry(kind, shape, place, size)
        place += -(-size // alignment) * alignment
    return entries


def read_tensor(gguf, data, name, entry):
    """Returns a tensor, float32. Raises ValueError for a type that the package cannot dequantize."""
    block, block_size = gguf.GGML_QUANT_SIZES[entry.kind]
    row_size = entry.shape[-1] // block * block_size
    rows = data[entry.start : entry.start + entry.size].reshape(-1, row_size)
    try:
        array = gguf.dequantize(rows, entry.kind)
    except NotImplementedError:
        raise ValueError(f"tensor {name} is {entry.kind.name}, which is not read here") from None
    array = np.require(array, np.float32, "W")  # a copy of what is still the mapped file
    return torch.from_numpy(array.reshape(entry.shape))


def open_file(path):
    """Returns (gguf, the file's bytes, metadata, {name: Entry}). Raises ValueError, OSError and Refusal."""
    gguf = import_gguf("reading")
    if os.path.getsize(path) == 0:  # an empty file cannot be mapped
        raise ValueError("the file is empty")
    data = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
    return gguf, data, *read_header(gguf, data)


def read_tokenizer(path):
    """Returns the tokenizer of a file. Raises ValueError, OSError and Refusal."""
    _, _, metadata, _ = open_file(path)
    return gguf_tokenizer.read_tokenizer(metadata)


def read(path):
    """Returns (ModelConfig, our state dict, tokenizer) of a file. Raises ValueError, OSError and Refusal."""
    gguf, data, metadata, entries = open_file(path)
    divisors = None
    if entry := entries.pop(gguf_config.FREQUENCIES, None):
        divisors = read_tensor(gguf, data, gguf_config.FREQUENCIES, entry)
    c = gguf_config.read_config(metadata, entries.keys(), divisors)
    tokenizer = gguf_tokenizer.read_tokenizer(metadata)
    c = replace(c, vocab_size=tokenizer.vocab_size)
    architecture = metadata["general.architecture"]
    gguf_layout.check_shapes(architecture, c, {name: entry.shape for name, entry in entries.items()})
    tensors = {name: read_tensor(gguf, data, name, entry) for name, entry in entries.items()}
    return c, gguf_layout.from_gguf(architecture, c, tensors), tokenizer
