"""How the execution of one notebook ended: what `run` gives and `report` shows."""

from dataclasses import dataclass


@dataclass
class Result:
    """How one notebook's execution ended. verdict is "ok" or a one-line cause; peak_vram_bytes is 0 without an NVIDIA GPU."""

    notebook: str
    seconds: float
    peak_ram_bytes: int
    verdict: str
    peak_vram_bytes: int = 0

    @property
    def ok(self) -> bool:
        """Whether the notebook ran to its end."""
        return self.verdict == "ok"
