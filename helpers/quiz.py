"""A short quiz at the end of a notebook: live where there is a front end, with folded answers elsewhere. The questions are data."""

import html

from helpers import progress, widgets
from helpers.process import headless

LETTERS = "ABCDE"


class Quiz:
    """The quiz of a notebook: `Quiz("04_nf4_bitsandbytes")` as the last line of a cell. Right answers are kept as progress.

    Its choices are buttons because JupyterLab takes the arrow keys, which lists and radio buttons need, for itself.
    """

    def __init__(self, notebook: str):
        import ipywidgets

        self.notebook, self.questions = notebook, progress.questions().get(notebook, [])
        if not self.questions:
            raise ValueError(f"there is no quiz for {notebook!r}; there are {', '.join(progress.questions())}")
        self.buttons, self.answers, rows = [], [], []
        for number, question in enumerate(self.questions):
            buttons = [
                ipywidgets.Button(description=f"{number + 1} {letter}", tooltip=choice["text"], layout={"width": "4em"})
                for letter, choice in zip(LETTERS, question["choices"])
            ]
            for place, button in enumerate(buttons):
                button.on_click(lambda _, number=number, place=place: self.choose(number, place))
            self.buttons.append(buttons)
            self.answers.append(ipywidgets.HTML())
            choices = "".join(f"<li>{html.escape(choice['text'])}</li>" for choice in question["choices"])
            asked = f"<p><b>{number + 1}.</b> {html.escape(question['question'])}</p><ol type='A'>{choices}</ol>"
            rows += [ipywidgets.HTML(asked), ipywidgets.HBox(buttons), self.answers[-1]]
        self.widget = ipywidgets.VBox(rows)

    def choose(self, number: int, place: int) -> bool:
        """Say whether a choice of a question is right, and why; both count from 0. A right one is kept. Returns whether it was right."""
        choice = self.questions[number]["choices"][place]
        verdict = f"{LETTERS[place]} is {'right' if choice['right'] else 'not right'}."
        self.answers[number].value = f"<p role='status'><b>{verdict}</b> {html.escape(choice['why'])}</p>"
        if choice["right"]:
            progress.add(self.notebook, "quiz", [number])
        return choice["right"]

    def __repr__(self):
        return "\n".join(
            f"{number}. {question['question']}\n"
            + "\n".join(f"   - {choice['text']}" for choice in question["choices"])
            for number, question in enumerate(self.questions, 1)
        )

    def static(self) -> str:
        """The quiz as HTML without a kernel: the answers are folded, with a reason for each choice."""
        items = []
        for question in self.questions:
            choices = "".join(f"<li>{html.escape(choice['text'])}</li>" for choice in question["choices"])
            reasons = "".join(
                f"<li><b>{'Right' if choice['right'] else 'Not right'}:</b> {html.escape(choice['text'])}. {html.escape(choice['why'])}</li>"
                for choice in question["choices"]
            )
            items.append(
                f"<li>{html.escape(question['question'])}<ul>{choices}</ul><details><summary>Answer</summary><ul>{reasons}</ul></details></li>"
            )
        return f"<ol>{''.join(items)}</ol>"

    def _repr_mimebundle_(self, **_):
        static = {"text/plain": repr(self), "text/html": self.static()}
        return static if headless() else {**static, **widgets.view(self.widget)}
