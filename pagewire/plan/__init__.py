"""What a model needs, before any weight is read: memory, blocks, largest batch and context. No GPU and no torch."""

from pagewire.plan.memory import Memory, Setup, estimate_memory
from pagewire.plan.room import Room, largest_batch, largest_context, longest_served, room
from pagewire.plan.sizes import ModelSizes, PlanError, Sizes, TransformersSizes, read_sizes

__all__ = [
    "Memory",
    "ModelSizes",
    "PlanError",
    "Room",
    "Setup",
    "Sizes",
    "TransformersSizes",
    "estimate_memory",
    "largest_batch",
    "largest_context",
    "longest_served",
    "read_sizes",
    "room",
]
