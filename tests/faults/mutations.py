"""Random inputs: almost valid bytes, JSON of any form, names that file systems refuse."""

from __future__ import annotations

import json
from random import Random
from typing import Any

NUMBERS = (
    0,
    1,
    -1,
    2,
    7,
    8,
    63,
    64,
    100,
    255,
    256,
    2**31 - 1,
    2**31,
    2**32,
    2**63 - 1,
    2**63,
    10**30,
)
REALS = (0.0, -0.0, 1.5, -1e-300, 1e308, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    "", " ", "\0", "\n", "a\nb", "..", "../..", "/etc/passwd", "~", "é", "日本", "\u202e", "\ud800",
    "x" * 300, "True", "null", "1e5", "0x10", "1_000", "²", "٣", "-", "--", "%s%n", "{}", "$HOME",
)  # fmt: skip
BYTES = (0, 1, 9, 10, 13, 32, 34, 39, 46, 47, 58, 91, 92, 123, 125, 127, 128, 254, 255)


def mutated(random: Random, data: bytes, most: int = 8) -> bytes:
    """Some of: bits flipped, bytes set, pieces cut, doubled, moved, numbers made extreme."""
    data = bytearray(data)
    for _ in range(random.randint(1, most)):
        if not data:
            return random.randbytes(random.randint(0, 50))
        at = random.randrange(len(data))
        size = min(random.choice((1, 2, 4, 8, 50)), len(data) - at)
        kind = random.randrange(7)
        if kind == 0:
            data[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            data[at] = random.choice(BYTES)
        elif kind == 2:
            del data[at : at + size]
        elif kind == 3:
            data[at:at] = data[at : at + size] * random.choice((1, 1, 1, 20))
        elif kind == 4:
            data[at:at] = random.randbytes(size)
        elif kind == 5:
            order = random.choice(("little", "big"))
            data[at : at + size] = (random.choice(NUMBERS) % 256**size).to_bytes(size, order)
        elif random.random() < 0.3:
            del data[at:]
    return bytes(data)


def junk(random: Random, depth: int = 2) -> Any:
    """Any JSON value."""
    kind = random.randrange(8 if depth else 5)
    if kind == 0:
        return random.choice(NUMBERS)
    if kind == 1:
        return random.choice(REALS)
    if kind == 2:
        return random.choice(TEXTS)
    if kind == 3:
        return random.choice((None, True, False))
    if kind == 4:
        return "".join(
            chr(random.choice((random.randrange(32, 127), 233, 0x1F600))) for _ in range(5)
        )
    if kind == 5:
        return {random.choice(TEXTS): junk(random, depth - 1) for _ in range(random.randrange(3))}
    return [junk(random, depth - 1) for _ in range(random.randrange(4))]


def altered(random: Random, value: Any) -> Any:
    """A JSON value with one place of it, at any depth, changed, removed or added."""
    if isinstance(value, (dict, list)) and value and random.random() < 0.75:
        copy = value.copy()
        key = random.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if random.random() < 0.15:
            del copy[key]
        elif random.random() < 0.1:
            (copy.update({random.choice(TEXTS): copy[key]}) if isinstance(copy, dict)
             else copy.append(copy[key]))  # fmt: skip
        else:
            copy[key] = altered(random, copy[key])
        return copy
    return junk(random)


def nearly_json(random: Random, value: Any) -> bytes:
    """The value's JSON: one place of it another, its bytes changed, or nested without end."""
    kind = random.random()
    if kind < 0.02:
        return b"[" * 100_000
    if kind < 0.3:
        return mutated(random, json.dumps(value).encode())
    return json.dumps(altered(random, value)).encode()


def name(random: Random, parts: tuple[str, ...]) -> str:
    """A file name of these parts and others; no separator, never a folder's own name."""
    chosen = [
        random.choice(parts) if random.random() < 0.8 else random.choice(TEXTS)
        for _ in range(random.randint(1, 7))
    ]
    made = "".join(chosen).replace("/", "").replace("\0", "").replace("\ud800", "\udcff")
    return made if made.strip(".") else "x"
