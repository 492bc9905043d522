"""Reads the machine code of compiled kernels: for a known mistake of the assembler, and for spills.

Both forms of it are read: that of NVIDIA's tools and that of Triton's ``asm["sass"]``.

ptxas 12.8, which Triton 3.6 ships, can add an offset to the address of a matrix product's operand
in a uniform register that does not hold the address: it places the addition before the address is
made. It was seen where two products of different widths read the same shared memory in turn, most
often after a loop of one iteration. The results are wrong, or memory out of bounds is read.
"""

import re
from typing import NamedTuple

_LINE = re.compile(r"(?:/\*([0-9a-f]{4,})\*/\s+|^[\w:-]+\t)(.*?);")
_LABEL = re.compile(r"^\s*(\w+):\s*$")
_UNIFORM = re.compile(r"\bUR(\d+)\b")
_DESCRIPTOR = re.compile(r"gdesc\[UR(\d+)\]")


class Descriptor(NamedTuple):
    """An operand of a product whose address is not made before it, in the order of the code."""

    at: str
    register: int


def lost_descriptors(sass: str) -> tuple[int, list[Descriptor]]:
    """(matrix products found, operands of them whose address was never made).

    Follows the uniform registers in the order of the text. An address is made by USGXT or ULOP3,
    which cut its bits out, or comes from a vector register; copies and sums of one are addresses.
    """
    addresses: set[int] = set()
    lost, products = [], 0
    for number, line in enumerate(sass.splitlines()):
        found = _LINE.search(line)
        if found is None:
            continue
        words = re.sub(r"^@!?U?P\w+\s+", "", found[2].strip()).split(None, 1)
        if len(words) < 2:
            continue
        name, operands = words[0], [x.strip() for x in words[1].split(",")]
        if name.startswith("HGMMA"):
            products += 1
            lost += [
                Descriptor(found[1] or f"line {number}", register)
                for register in _operands(operands)
                if register not in addresses
            ]
            continue
        target = re.fullmatch(r"UR(\d+)", operands[0])
        if target is None or not (name[0] == "U" or name.startswith(("R2UR", "S2UR"))):
            continue
        written = int(target[1])
        sources = {int(r) for x in operands[1:] for r in _UNIFORM.findall(x)}
        made = name.startswith(("USGXT", "ULOP3", "R2UR"))
        passed = name.startswith(("UMOV", "UIADD3")) and not name.startswith("UIADD3.X")
        if made or (passed and sources & addresses):
            addresses.add(written)
        else:
            addresses.discard(written)
        if ".64" in name:
            addresses.discard(written + 1)
    return products, lost


def _operands(operands: list[str]) -> list[int]:
    """Registers of the addresses that a product reads: of both operands, or of the second one."""
    registers = []
    for place, operand in enumerate(operands):
        found = _DESCRIPTOR.match(operand)
        if found is not None:
            # Two descriptors of two registers each; the first is unused if its operand is not.
            first = int(found[1])
            registers += [first, first + 2] if place == 1 else [first + 2]
    return registers


def local_accesses_in_loops(sass: str) -> list[int]:
    """Reads and writes of local memory in each loop of Triton's code that has matrix products."""
    lines, labels, counts = sass.splitlines(), {}, []
    for number, line in enumerate(lines):
        if label := _LABEL.match(line):
            labels[label[1]] = number
        branch = re.search(r"\bBRA (\w+)", line)
        if branch is None or branch[1] not in labels:
            continue
        loop = lines[labels[branch[1]] : number]
        if any("HGMMA" in x for x in loop):
            counts.append(sum(bool(re.search(r"\b(LDL|STL)\b", x)) for x in loop))
    return counts
