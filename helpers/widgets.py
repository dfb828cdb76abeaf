"""Widgets in the output of a cell, whichever ipywidgets is there: the memory monitor and the chat box."""

import html
import threading
from typing import Any, Self

import psutil

from helpers import chat, memory
from helpers.process import headless


def view(widget: Any) -> dict[str, Any]:
    """What a cell shows of a widget, by MIME type: for a `_repr_mimebundle_` that adds a static twin to it.

    ipywidgets 7, which Colab brings along, has no method for this.
    """
    if hasattr(widget, "_repr_mimebundle_"):
        return widget._repr_mimebundle_()
    reference = {"version_major": 2, "version_minor": 0, "model_id": widget.model_id}
    return {"text/plain": repr(widget), "application/vnd.jupyter.widget-view+json": reference}


class Monitor:
    """A live widget with the RAM and VRAM of this process: `monitor = Monitor(); monitor` in a cell, `monitor.stop()` to end.

    Without a front end (papermill, GitHub) it shows one line of text with the numbers at that moment.
    """

    def __init__(self, interval: float = 1.0):
        import ipywidgets

        self.interval = interval
        self._done = threading.Event()
        layout = ipywidgets.Layout(width="95%")
        self._bars = {name: ipywidgets.FloatProgress(0, min=0, max=100, layout=layout) for name in self.read()}
        self._labels = {name: ipywidgets.Label() for name in self._bars}
        self._button = ipywidgets.Button(description="Stop monitor", tooltip="Stop refreshing the memory numbers")
        self._button.on_click(lambda _: self.stop())
        rows = [box for name in self._bars for box in (self._labels[name], self._bars[name])]
        self.widget = ipywidgets.VBox([*rows, self._button])
        self.refresh()

    @staticmethod
    def read() -> dict[str, tuple[int, int]]:
        """{"RAM": (used, total)} in bytes, and "VRAM" where there is a GPU."""
        readings = {"RAM": (psutil.Process().memory_info().rss, psutil.virtual_memory().total)}
        cuda = memory.cuda()
        if cuda:
            free, total = cuda.mem_get_info()
            readings["VRAM"] = (total - free, total)
        return readings

    def refresh(self) -> None:
        """Read the numbers anew and show them."""
        for name, (used, total) in self.read().items():
            self._bars[name].value = 100 * used / total
            self._labels[name].value = f"{name} {used / 1e9:.2f} of {total / 1e9:.1f} GB"

    def start(self) -> Self:
        """Refresh every `interval` seconds until `stop()`."""
        self._done.clear()
        threading.Thread(target=self._loop, daemon=True).start()
        return self

    def stop(self) -> None:
        """End the refreshing that `start` began."""
        self._done.set()

    def _loop(self):
        while not self._done.wait(self.interval):
            self.refresh()

    def __repr__(self):
        return ", ".join(
            f"{name} {used / 1e9:.2f} of {total / 1e9:.1f} GB" for name, (used, total) in self.read().items()
        )

    def _repr_mimebundle_(self, **_):
        return {"text/plain": repr(self)} if headless() else {**view(self.widget), "text/plain": repr(self)}


class ChatBox:
    """A chat widget on a ChatSession. What anybody says is escaped, so an answer with a script tag is shown, not run."""

    def __init__(self, session: chat.ChatSession):
        import ipywidgets

        self.session = session
        self.log = ipywidgets.HTML()
        self.entry = ipywidgets.Text(
            placeholder="Ask something and press Enter", description="You:", layout={"width": "70%"}
        )
        self.send_button = ipywidgets.Button(description="Send", tooltip="Send the message")
        self.stop_button = ipywidgets.Button(description="Stop", tooltip="Stop the running answer", disabled=True)
        self.send_button.on_click(lambda _: self._submit())
        self.entry.on_submit(lambda _: self._submit()) if hasattr(self.entry, "on_submit") else None
        self.stop_button.on_click(lambda _: session.stop())
        row = ipywidgets.HBox([self.entry, self.send_button, self.stop_button])
        self.widget = ipywidgets.VBox([self.log, row])
        self._show()

    def ask(self, text: str) -> None:
        """Send `text` and show the answer as it comes; blocks until it is complete."""
        self.send_button.disabled, self.stop_button.disabled = True, False
        shown = [*self.session.turns, {"role": "user", "content": text}]
        pieces = []
        try:
            for piece in self.session.stream(text):
                pieces.append(piece)
                self._show([*shown, {"role": "assistant", "content": "".join(pieces)}])
            kept = self.session.turns != shown[:-1]  # not so if the model was cut off while thinking
            note = (
                "The answer was cut off: session.resume() goes on." if getattr(self.session, "cut_off", False) else None
            )
            self._show(None if kept else [*shown, {"role": "assistant", "content": "".join(pieces)}], note)
        except chat.ChatError as error:
            self._show(shown, note=str(error))
        finally:
            self.send_button.disabled, self.stop_button.disabled = False, True

    def _submit(self):
        text = self.entry.value.strip()
        if text and not self.send_button.disabled:
            self.entry.value = ""
            threading.Thread(target=self.ask, args=(text,), daemon=True).start()

    def _show(self, turns=None, note=None):
        turns = self.session.turns if turns is None else turns
        self.log.value = transcript_html(turns) + (f"<p role='alert'>{html.escape(note)}</p>" if note else "")

    def __repr__(self):
        return (
            "\n".join(f"{turn['role']}: {chat.text_of(turn.get('content') or '')}" for turn in self.session.turns)
            or "(chat box: open the notebook in Jupyter to use it)"
        )

    def _repr_mimebundle_(self, **_):
        static = {"text/html": transcript_html(self.session.turns), "text/plain": repr(self)}
        return static if headless() else {**static, **view(self.widget)}


def transcript_html(turns: list[dict]) -> str:
    """Turns as HTML paragraphs with everything escaped."""
    rows = (
        f"<p><b>{html.escape(turn['role'])}:</b> {html.escape(chat.text_of(turn.get('content') or ''))}</p>"
        for turn in turns
    )
    return f"<div role='log' aria-live='polite' style='white-space: pre-wrap'>{''.join(rows)}</div>"
