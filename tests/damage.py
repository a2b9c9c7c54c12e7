"""Damaged files, drawn from a seed: bytes, JSON values of other types and extremes, tensors."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

import safetensors.torch
import torch
from torch import Tensor


def deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


EXTREMES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**63, 10**30, 10**400, -(10**400),
    0.0, -0.0, 0.5, 1.0, -1.0, 1e-320, 1e300, -1e300, 3e8, float("nan"), float("inf"),
    -float("inf"), "", " ", "a", "0", "1.0", "nan", "inf", "none", "None", "auto", "\0", "\u2028",
    "\x85", "é", "\ud800", "\u202e", "x" * 5000, "../..", "/", "$x^$", "(a|aa)+[b-d]", "(", "[",
    "(?i)q", "{", "%s", "{{", "a.b.c", ".", "*", "default", "base_model.model.", "[1]", "null",
    [], [None], ["a"], ["a", "a"], [0], [1, 2], [1.5], [True], [[]], [{}], ["", "\ud800"],
    {}, {"a": 1}, {"": {}}, {"0": [0]}, {"(": 1}, {"a": "b"}, {"content": None}, [1] * 1000,
    "9" * 400, deep(50),
)  # fmt: skip


def extreme(draw: random.Random) -> Any:
    """One of EXTREMES, of which nothing that is done to it reaches the next."""
    return copy.deepcopy(draw.choice(EXTREMES))


BYTES = (b"", b"\0", b"\xff", b"\n", b"\r", b"\t", b",", b'"', b"{", b"}", b"[", b"\xe2\x80\xa8",
         b"\xc2\x85", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"9" * 50, b"-", b"1e999", b"null", b"NaN",
         b"\\u0000", b"\\ud800", b"PK\x03\x04")  # fmt: skip


def of_bytes(payload: bytes, draw: random.Random) -> bytes:
    """One to four changes: bits, bytes, a part doubled, cut out, or all behind it cut off."""
    found = bytearray(payload)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        at = draw.randrange(len(found) + 1)
        end = min(len(found), at + draw.choice((1, 2, 8, 64)))
        kind = draw.randrange(6)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            found[at:end] = draw.randbytes(end - at)
        elif kind == 2:
            found[at:at] = draw.choice(BYTES)
        elif kind == 3:
            del found[at:end]
        elif kind == 4:
            found[at:at] = found[at:end]
        elif draw.random() < 0.3:
            del found[at:]
    return bytes(found)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Each (container, key) of a JSON value, however deep."""
    found: list[tuple[Any, Any]] = []
    stack = [value]
    while stack:
        one = stack.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one))
        for key in keys:
            found.append((one, key))
            if isinstance(one[key], dict | list):
                stack.append(one[key])
    return found


def of_json(value: Any, draw: random.Random) -> Any:
    """A copy with one to three values of other types or extremes, keys gone, doubled or renamed."""
    found = json.loads(json.dumps(value))
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        there = places(found) if isinstance(found, dict | list) else []
        if not there or draw.random() < 0.01:
            found = extreme(draw)
            continue
        holder, key = draw.choice(there)
        old, kind = holder[key], draw.randrange(10)
        if kind < 5:
            holder[key] = extreme(draw)
        elif kind == 5:
            del holder[key]
        elif kind == 6 and isinstance(holder, dict):
            holder[str(draw.choice(EXTREMES))[:100]] = holder.pop(key)
        elif kind == 7:
            holder[key] = [old] if draw.random() < 0.5 else {"a": old}
        elif kind == 8:
            other, place = draw.choice(there)
            if other is not holder or not isinstance(holder, list):
                value_there = other.get(place) if isinstance(other, dict) else old
                holder[key] = json.loads(json.dumps(value_there))
        elif isinstance(old, str):
            holder[key] = of_bytes(old.encode("utf-8", "replace"), draw).decode("utf-8", "replace")
        elif isinstance(old, int | float) and abs(old) < 1e15:
            holder[key] = draw.choice((-old, old + 1, old * 2, str(old), float(old), old / 2))
    return found


def of_document(value: Any, draw: random.Random) -> bytes:
    """A JSON document, damaged as values or as bytes."""
    if draw.random() < 0.7:
        payload = json.dumps(of_json(value, draw), ensure_ascii=draw.random() < 0.8).encode(
            "utf-8", "surrogatepass"
        )
    else:
        payload = of_bytes(json.dumps(value).encode(), draw)
    if draw.random() < 0.01:
        payload = payload.replace(b"1", b"9" * 5000, 1)
    return payload


def of_lines(rows: list[Any], draw: random.Random) -> bytes:
    """JSON lines, one of them damaged as a document, or the whole as bytes."""
    lines = [json.dumps(row).encode() for row in rows]
    if draw.random() < 0.8:
        at = draw.randrange(len(rows))
        lines[at] = of_document(rows[at], draw)
    payload = b"\n".join(lines) + b"\n"
    return payload if draw.random() < 0.8 else of_bytes(payload, draw)


CHANGES: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda t: t.to(torch.int8),
    lambda t: t.to(torch.int64),
    lambda t: t.to(torch.bool),
    lambda t: t.to(torch.float64),
    lambda t: t.to(torch.bfloat16),
    lambda t: t.to(torch.complex64),
    lambda t: t.float().to(torch.float8_e5m2),
    lambda t: t.flatten(),
    lambda t: t[None],
    lambda t: t[:0] if t.dim() else t,
    lambda t: t[..., :-1] if t.dim() else t,
    lambda t: torch.cat([t, t]) if t.dim() else t[None],
    lambda t: t.flatten()[:1].reshape(()) if t.numel() else t,
    lambda t: t.float() * float("nan"),
    lambda t: t.float() * 1e38 * 10,
    lambda t: t.float() * 1e300,
    lambda t: t.T if t.dim() == 2 else t,
    lambda t: torch.zeros_like(t),
    lambda t: torch.full_like(t, 255) if t.dtype == torch.uint8 else -t.float(),
)


def of_tensors(tensors: dict[str, Tensor], draw: random.Random) -> dict[str, Tensor]:
    """Tensors of other dtypes, shapes and values, some gone, some under other names."""
    found = dict(tensors)
    for _ in range(draw.choice((1, 1, 2, 3))):
        if not found:
            break
        key, kind = draw.choice(sorted(found)), draw.randrange(8)
        if kind < 5:
            found[key] = draw.choice(CHANGES)(found[key]).contiguous()
        elif kind == 5:
            del found[key]
        else:
            names = (key + "x", key[1:], "", "a.b", key.upper(), draw.choice(sorted(found)))
            moved = found[key] if kind == 6 else found.pop(key)
            found[draw.choice(names)] = moved.clone()
    return found


DTYPES = (b"F4", b"F6_E2M3", b"F8_E8M0", b"F64", b"C64", b"U16", b"I32", b"BOOL", b"F99")


def of_safetensors(payload: bytes, draw: random.Random) -> bytes:
    """A safetensors file: other tensors, another header, or other bytes."""
    kind = draw.randrange(4)
    if kind == 0:
        return of_bytes(payload, draw)
    if kind == 1:
        changed = of_tensors(safetensors.torch.load(payload), draw)
        length = int.from_bytes(payload[:8], "little")
        metadata = json.loads(payload[8 : 8 + length]).get("__metadata__")
        return safetensors.torch.save(changed, metadata)
    length = int.from_bytes(payload[:8], "little")
    header = of_document(json.loads(payload[8 : 8 + length]), draw)
    if draw.random() < 0.1:
        header = header.replace(b"F32", draw.choice(DTYPES))
    size = len(header) if draw.random() < 0.95 else draw.choice((0, 1, 2**40, 2**63))
    return size.to_bytes(8, "little") + header + payload[8 + length :]
