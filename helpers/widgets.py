"""Widgets in the output of a cell, whichever ipywidgets is there."""


def view(widget):
    """What a cell shows of a widget, by MIME type: for a `_repr_mimebundle_` that adds a static twin to it.

    ipywidgets 7, which Colab brings along, has no method for this.
    """
    if hasattr(widget, "_repr_mimebundle_"):
        return widget._repr_mimebundle_()
    reference = {"version_major": 2, "version_minor": 0, "model_id": widget.model_id}
    return {"text/plain": repr(widget), "application/vnd.jupyter.widget-view+json": reference}
