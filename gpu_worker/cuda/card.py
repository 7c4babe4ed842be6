"""What compilers must know of a card, and where it comes from before torch is there."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

_SMS, _MAJOR, _MINOR = 16, 75, 76  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, _COMPUTE_CAPABILITY_MAJOR, _MINOR


@dataclass(frozen=True)
class Card:
    """A card's compute capability and number of SMs."""

    major: int
    minor: int
    sms: int

    @property
    def arch(self) -> str:
        """What NVRTC calls it."""
        return f"sm_{self.major}{self.minor}" + ("a" if self.hopper else "")

    @property
    def capability(self) -> int:
        """What Triton calls it."""
        return 10 * self.major + self.minor

    @property
    def shared(self) -> int:
        """Bytes of shared memory that a block may have at least (CUDA programming guide, compute capabilities)."""
        return (99 if (self.major, self.minor) in ((8, 6), (8, 9)) or self.major >= 12 else 163) << 10

    @property
    def hopper(self) -> bool:
        """Whether it has clusters and wgmma, as our kernels use them."""
        return self.major == 9


def first_card() -> Card | None:
    """The driver's first card, which is torch's; None if the driver does not tell."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, value = ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
        return None
    found = []
    for which in (_MAJOR, _MINOR, _SMS):
        if cuda.cuDeviceGetAttribute(ctypes.byref(value), which, device):
            return None
        found.append(value.value)
    return Card(*found)
