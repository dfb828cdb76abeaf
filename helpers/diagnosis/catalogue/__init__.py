"""The errors a reader of this course meets, as data: how to recognize one, what causes it, what repairs it, where it is discussed.

Entries stand in the order of a reader's work, a module for each topic: install, load, memory, generate, quantize, train, save, Colab and
Jupyter. An entry is either reproduced (helpers/reproductions.py raises it on the pinned versions and a test checks it) or recorded, with
its source.
"""

from helpers.diagnosis.catalogue import colab, generate, install, load, memory, quantize, save, train
from helpers.diagnosis.catalogue.base import TOPICS, Entry, L, P  # noqa: F401 - what tests and notebooks take from here

ENTRIES = tuple(
    entry for topic in (install, load, memory, generate, quantize, train, save, colab) for entry in topic.ENTRIES
)
BY_ID = {entry.id: entry for entry in ENTRIES}
DISTRIBUTIONS = {
    "awq": "autoawq",
    "auto_gptq": "auto-gptq",
    "llama_cpp": "llama-cpp-python",
    "google.colab": "google-colab",
    "PIL": "pillow",
}


def find(entry_id: str) -> Entry:
    """The entry with this id; KeyError names the id."""
    return BY_ID[entry_id]
