"""Failures of Colab, Jupyter and papermill, each with its repair."""

import asyncio
import contextlib

from helpers.diagnosis.reproductions.parts import run_as_cell, tiny_tokenizer
from helpers.diagnosis.reproductions.registry import fails, works


@fails("cell-not-run")
def _():
    exec(compile("tokenizer('hi')", "<cell>", "exec"), {})  # a fresh kernel, and a cell further down


@works("cell-not-run")
def _():
    exec("tokenizer('hi')", {"tokenizer": tiny_tokenizer()})
    return "the cell that defines it ran first"


@fails("running-event-loop")
def _():
    async def cell():
        with contextlib.closing(asyncio.sleep(0)) as work:
            asyncio.run(work)

    run_as_cell(cell)


@works("running-event-loop")
def _():
    async def cell():
        await asyncio.sleep(0)
        return "awaited in the loop that is running"

    return run_as_cell(cell)
