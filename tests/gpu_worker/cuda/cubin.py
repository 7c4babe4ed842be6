"""What machine code says of a kernel's parameters: the attributes in its section `.nv.info.NAME` (ELF; `cuobjdump -elf` shows them)."""

from __future__ import annotations

import struct

from gpu_worker.cuda.driver import Kernel, _places

_SIZED, _PARAMETER = 4, 0x17  # an attribute with its own size; EIATTR_KPARAM_INFO


def _section(cubin: bytes, wanted: str) -> bytes:
    (table,) = struct.unpack_from("<Q", cubin, 40)
    entry, count, names = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * entry) for i in range(count)]
    for name, _, _, _, at, size in headers:
        begin = headers[names][4] + name
        if cubin[begin : cubin.index(b"\0", begin)].decode() == wanted:
            return cubin[at : at + size]
    raise LookupError(wanted)


def parameters(cubin: bytes, kernel: str) -> list[tuple[int, int]]:
    """Offset and size of each parameter, in bytes."""
    found, told, at = {}, _section(cubin, f".nv.info.{kernel}"), 0
    while at < len(told):
        form, attribute, value = struct.unpack_from("<BBH", told, at)
        if form == _SIZED and attribute == _PARAMETER:
            _, place, offset, flags = struct.unpack_from("<IHHI", told, at + 4)
            found[place] = offset, flags >> 18
        at += 4 + (value if form == _SIZED else 0)
    return [found[place] for place in range(len(found))]


def check_signature(kernel: Kernel) -> None:
    """A launch puts arguments where the kernel reads them. A struct is one parameter and several arguments."""
    told = parameters(kernel.module._cubin(), kernel.name)
    first, (last, size) = told[0][0], told[-1]  # a descriptor is the first, at a multiple of 64 of the driver's choice
    assert {offset - first for offset, _ in told} <= set(_places(kernel._pack.format[1:])), (kernel.name, told)
    assert last + size - first == kernel._pack.size, (kernel.name, told)
