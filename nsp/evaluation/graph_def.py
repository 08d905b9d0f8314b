"""Reads a frozen TensorFlow graph (GraphDef) without TensorFlow: nodes, attributes, constants.

The format is that of protocol buffers: a field is a number, a wire type and a value; messages are
values of fields. Only what a frozen graph of an image classifier needs is read. A file from
somebody else may be an attack: lengths are checked before bytes are taken, and the depth is fixed.

Source: tensorflow/core/framework, graph.proto, node_def.proto, attr_value.proto, tensor.proto;
protobuf.dev/programming-guides/encoding.
"""

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from nsp.data.bounds import read_regular
from nsp.errors import DataError
from nsp.sniff import explain, sniff

MAX_BYTES = 256 << 20  # of the file; the ADM evaluator's graph has 95.7 MB
_MAX_NODES = 20_000  # that graph has about 1,000
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# DataType -> NumPy type, and the field of TensorProto that lists its values.
_TYPES: Mapping[int, tuple[str, int]] = {
    1: ("<f4", 5),
    2: ("<f8", 6),
    3: ("<i4", 7),
    9: ("<i8", 10),
}

Field: TypeAlias = tuple[int, int, int | memoryview]  # number, wire type, value
Attribute: TypeAlias = bool | int | float | bytes | tuple[int, ...] | memoryview


@dataclass(frozen=True, kw_only=True)
class Node:
    """One operation; a tensor among the attributes stays encoded until `constant` reads it."""

    name: str
    op: str
    inputs: tuple[str, ...]
    attributes: Mapping[str, Attribute]

    def integers(self, name: str) -> tuple[int, ...]:
        """Return a list of integers among the attributes; ValueError if there is none."""
        value = self.attributes.get(name)
        if not isinstance(value, tuple):
            raise ValueError(f"attribute {name} is not a list of integers")
        return value

    def text(self, name: str, default: str) -> str:
        """Return a text among the attributes."""
        value = self.attributes.get(name, default.encode())
        return value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)

    def number(self, name: str, default: float) -> float:
        """Return a number or a truth value among the attributes."""
        value = self.attributes.get(name, default)
        if not isinstance(value, int | float):
            raise ValueError(f"attribute {name} is not a number")
        return value

    def constant(self) -> NDArray[np.generic]:
        """Return the value of a node of op Const; ValueError for a type other than numbers."""
        value = self.attributes.get("value")
        if not isinstance(value, memoryview):
            raise ValueError("it has no value")
        return _tensor(value)


def read_graph(path: Path) -> dict[str, Node]:
    """Return the nodes of a frozen graph by name; DataError in one line for anything else."""
    try:
        content = memoryview(read_regular(path, most_bytes=MAX_BYTES))
        nodes: dict[str, Node] = {}
        for number, _, value in _fields(content):
            if number == 1 and isinstance(value, memoryview):
                node = _node(value)
                nodes[node.name] = node
            if len(nodes) > _MAX_NODES:
                raise ValueError(f"more than {_MAX_NODES} nodes")
        if not nodes or not all(node.op for node in nodes.values()):
            raise ValueError("no operations")
    except (ValueError, struct.error) as error:
        found = sniff(path)
        if found.is_spoilt or found.kind not in ("other", "text"):
            raise DataError(explain(path, expected="a GraphDef", found=found)) from error
        raise DataError(f"{path} is not a GraphDef file, or is damaged ({error})") from error
    except DataError as error:
        raise DataError(f"{path} is not a GraphDef: {error}") from None
    return nodes


def _fields(message: memoryview) -> Iterator[Field]:
    """Yield the fields of a message; ValueError where the bytes are none."""
    at, end = 0, len(message)
    while at < end:
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(message, at)
            yield number, wire, value
            continue
        if wire == _BYTES:
            size, at = _varint(message, at)
        else:
            size = {_FIXED64: 8, _FIXED32: 4}.get(wire, -1)
        if size < 0 or number == 0 or size > end - at:
            raise ValueError(f"byte {at} is not part of a field")
        yield number, wire, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Return an integer of 7 bits per byte, lowest first, and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError("it ends in the middle of a number")
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (2**64 - 1), at
    raise ValueError("a number is longer than 64 bits")


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _integers(values: list[Field]) -> tuple[int, ...]:
    """Return repeated integers, packed or one by one."""
    found: list[int] = []
    for _, _, value in values:
        if isinstance(value, int):
            found.append(_signed(value))
            continue
        at = 0
        while at < len(value):
            each, at = _varint(value, at)
            found.append(_signed(each))
    return tuple(found)


def _node(message: memoryview) -> Node:
    texts: dict[int, str] = {}
    inputs: list[str] = []
    attributes: dict[str, Attribute] = {}
    for number, _, value in _fields(message):
        if not isinstance(value, memoryview):
            continue
        if number in (1, 2):
            texts[number] = bytes(value).decode("utf-8")
        elif number == 3:
            inputs.append(bytes(value).decode("utf-8"))
        elif number == 5:
            entry = {key: content for key, _, content in _fields(value)}
            name, content = entry.get(1), entry.get(2)
            if isinstance(name, memoryview) and isinstance(content, memoryview):
                attribute = _attribute(content)
                if attribute is not None:
                    attributes[bytes(name).decode("utf-8")] = attribute
    return Node(
        name=texts.get(1, ""), op=texts.get(2, ""), inputs=tuple(inputs), attributes=attributes
    )


def _attribute(message: memoryview) -> Attribute | None:
    """Return an attribute's value; None for kinds that no operation here has."""
    for number, wire, value in _fields(message):
        if isinstance(value, int):
            if number == 3:
                return _signed(value)
            if number == 5:
                return bool(value)
        elif number == 1:  # a list; those of integers are wanted
            return _integers([each for each in _fields(value) if each[0] == 3])
        elif number == 2:
            return bytes(value)
        elif number == 4 and wire == _FIXED32:
            return float(struct.unpack("<f", value)[0])
        elif number == 8:
            return value
    return None


def _tensor(message: memoryview) -> NDArray[np.generic]:
    """Return a TensorProto's array: raw bytes, listed values, or one value for all elements."""
    dtype, content = 0, None
    shape: tuple[int, ...] = ()
    listed: dict[int, list[Field]] = {}
    for number, wire, value in _fields(message):
        if number == 1 and isinstance(value, int):
            dtype = value
        elif number == 2 and isinstance(value, memoryview):
            shape = _shape(value)
        elif number == 4 and isinstance(value, memoryview):
            content = value
        else:
            listed.setdefault(number, []).append((number, wire, value))
    if dtype not in _TYPES:
        raise ValueError(f"a tensor has type {dtype}, which is not a type of numbers")
    name, number = _TYPES[dtype]
    kind, size = np.dtype(name), math.prod(shape)
    if size * kind.itemsize > MAX_BYTES:
        raise ValueError(f"a tensor of shape {shape} is too large")
    if content is None:
        values = _listed(listed.get(number, []), kind)
    else:
        values = np.frombuffer(content, kind) if len(content) % kind.itemsize == 0 else np.zeros(0)
    if len(values) == size:
        return values.reshape(shape)
    if content is None and len(values) == 1:
        return np.full(shape, values[0])
    raise ValueError(f"a tensor of shape {shape} has {len(values)} values")


def _listed(values: list[Field], kind: np.dtype[np.generic]) -> NDArray[np.generic]:
    """Return values that are listed one by one or packed."""
    if kind.kind == "i":
        return np.array(_integers(values), np.int64).astype(kind)
    return np.frombuffer(b"".join(v for _, _, v in values if isinstance(v, memoryview)), kind)


def _shape(message: memoryview) -> tuple[int, ...]:
    """Return a TensorShapeProto's sizes."""
    sizes = []
    for number, _, value in _fields(message):
        if number == 2 and isinstance(value, memoryview):
            found = {each: size for each, _, size in _fields(value) if each == 1}
            size = found.get(1, 0)
            if not isinstance(size, int) or not 0 <= _signed(size) < 2**31:
                raise ValueError("a tensor has a size that is not known")
            sizes.append(size)
    return tuple(sizes)
