"""Failures of the catalogue, provoked for real and repaired, on random models of two layers: notebook 13 and the tests share them.

    text = provoke("load-in-4bit")     # runs the failure: the traceback, or what was printed where nothing is raised
    evidence = repair("load-in-4bit")  # runs the repair to its end and says what it gave
    source("load-in-4bit")             # the code of the failure, for a reader; source(entry_id, repaired=True) that of the repair

The message always comes from the library. Where a failure needs an absent package, a full disk or a hub that refuses, the function
makes exactly that (an interpreter without packages, /dev/full, a local server that answers as the hub does) and nothing else.
"""

from helpers.diagnosis.reproductions import colab, generate, gguf, install, load, memory, quantize, save, train  # noqa: F401 - importing them registers their failures
from helpers.diagnosis.reproductions.parts import IDS, MISTRAL, TOKEN, lora, tiny_4bit, tiny_model, tiny_tokenizer  # noqa: F401
from helpers.diagnosis.reproductions.registry import (  # noqa: F401
    FAILURES,
    REPAIRS,
    DidNotHappen,
    listening,
    provoke,
    quiet,
    repair,
    source,
    why_not,
)
