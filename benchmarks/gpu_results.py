"""A row of the table of `benchmarks/gpu.py`, and a model to measure."""

import dataclasses
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

Shape = dict[str, Any]  # of a Llama, by the names of its configuration


@dataclasses.dataclass(frozen=True)
class Result:
    """A row of the table; with a goal above the least value, larger is better."""

    what: str
    measured: float
    goal: float
    least: float
    details: str

    @property
    def verdict(self) -> str:
        """Return whether the goal, or at least the least value, is reached."""
        sign = 1 if self.goal > self.least else -1
        if sign * self.measured >= sign * self.goal:
            return "reached"
        return "acceptable" if sign * self.measured >= sign * self.least else "missed"

    def __str__(self) -> str:
        numbers = f"{self.measured:.3g} | {self.goal:g} | {self.least:g}"
        return f"| {self.what} | {numbers} | {self.verdict} | {self.details} |"


def compared(seconds: dict[str, float]) -> str:
    """Return the cases with their milliseconds."""
    return ", ".join(f"{case} {1e3 * value:.3g} ms" for case, value in seconds.items())


def built(shape: Shape, device: torch.device) -> PreTrainedModel:
    """Return a Llama of this shape with random bfloat16 weights, made on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            LlamaConfig(**shape), dtype=torch.bfloat16
        )
    model.eval()  # type: ignore[no-untyped-call]
    return model
