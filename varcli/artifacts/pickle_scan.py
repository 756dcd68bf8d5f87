"""What a pickle of `torch.save` says, read off its opcodes: nothing is built, nothing is run."""

from __future__ import annotations

import pickletools
from dataclasses import dataclass, field
from typing import Any

_BYTES_PER_ELEMENT = {
    "ByteStorage": 1,
    "CharStorage": 1,
    "BoolStorage": 1,
    "UntypedStorage": 1,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "ShortStorage": 2,
    "FloatStorage": 4,
    "IntStorage": 4,
    "DoubleStorage": 8,
    "LongStorage": 8,
    "ComplexFloatStorage": 8,
    "ComplexDoubleStorage": 16,
}


@dataclass
class PickleScan:
    """The contents of one pickle."""

    texts: list[str] = field(default_factory=list)  # every text once, in order: the tensors' names are among them
    globals: list[str] = field(default_factory=list)  # every class and function it asks for: "collections OrderedDict"
    storages: dict[str, int] = field(default_factory=dict)  # bytes it claims for each storage, by key ("0", "1", ...)


def scan_pickle(data: bytes) -> PickleScan:
    """Read the opcodes of a pickle.

    Raises ValueError, with the reason, if it is damaged, if anything stands behind it, or if it asks for storages in
    another way than `torch.save` does.
    """
    scan = PickleScan()
    memo: dict[int, Any] = {}  # values by number; None for what is not a text, number or global
    since_mark: list[Any] = []
    last_tuple: list[Any] = []
    end = 0
    for opcode, argument, position in pickletools.genops(data):
        end = position + 1
        name = opcode.name
        if name == "MARK":
            since_mark = []
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = since_mark[-1] if since_mark else None
        elif name in ("BINGET", "LONG_BINGET"):
            since_mark.append(memo.get(argument))
        elif name == "TUPLE":
            last_tuple, since_mark = since_mark, [None]
        elif name == "BINPERSID":
            key, num_bytes = _read_storage(last_tuple)
            if scan.storages.setdefault(key, num_bytes) != num_bytes:
                raise ValueError(f"storage {key} has two sizes")
            since_mark = [None]
        elif name in ("GLOBAL", "INST"):
            scan.globals.append(argument)
            since_mark.append(argument)
        elif name == "STACK_GLOBAL":
            scan.globals.append(" ".join(scan.texts[-2:]))
        elif isinstance(argument, str) and "UNICODE" in name:
            scan.texts.append(argument)
            since_mark.append(argument)
        elif isinstance(argument, int):
            since_mark.append(argument)
        else:
            since_mark.append(None)
    if end != len(data):
        raise ValueError(f"{len(data) - end} bytes are hidden behind it")
    scan.globals = list(dict.fromkeys(scan.globals))
    scan.texts = list(dict.fromkeys(scan.texts))
    return scan


def _read_storage(entries: list[Any]) -> tuple[str, int]:
    """Return key and bytes of ("storage", class, key, device, elements), the one form that torch.save writes."""
    match entries:
        case ["storage", str(asked), str(key), str(), int(count)] if asked.startswith("torch"):
            kind = asked.split()[-1]
            if kind in _BYTES_PER_ELEMENT and count >= 0:
                return key, count * _BYTES_PER_ELEMENT[kind]
    raise ValueError("a storage is asked for in a way that torch.save never writes")
