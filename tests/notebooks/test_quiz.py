"""Quizzes and progress: the data are whole, answers are judged and explained, what was solved is kept and shown."""

import inspect
import json
import threading

import pytest

from helpers import exercises, files, progress, quiz, widgets
from helpers.publishing import pages

QUIZ = progress.questions()


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A reader's empty folder outside the checkout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COURSE_BATCH", raising=False)
    return tmp_path


def test_every_notebook_has_three_questions_with_one_right_choice_and_a_reason_for_each():
    assert {path.stem for path in pages.paths()} <= set(QUIZ)
    for notebook, questions in QUIZ.items():
        assert len(questions) == 3, notebook
        for question in questions:
            assert set(question) == {"question", "choices"} and question["question"].endswith("?")
            texts = [choice["text"] for choice in question["choices"]]
            assert len(set(texts)) == len(texts) >= 3 and max(map(len, texts)) <= 90, notebook
            assert sum(choice["right"] for choice in question["choices"]) == 1
            assert all(
                set(choice) == {"text", "right", "why"} and len(choice["why"]) > 15 for choice in question["choices"]
            )


def test_right_choices_are_not_always_in_the_same_place_nor_the_longest():
    places = [
        [choice["right"] for choice in question["choices"]].index(True)
        for questions in QUIZ.values()
        for question in questions
    ]
    longest = [
        max(question["choices"], key=lambda choice: len(choice["text"]))["right"]
        for questions in QUIZ.values()
        for question in questions
    ]
    assert max(map(places.count, set(places))) < 0.5 * len(places)
    assert sum(longest) < 0.5 * len(longest)


def test_a_quiz_judges_explains_and_keeps(reader):
    name = "04_nf4_bitsandbytes"
    box = quiz.Quiz(name)
    right = [[choice["right"] for choice in question["choices"]].index(True) for question in QUIZ[name]]
    wrong = (right[2] + 1) % 3
    assert box.choose(2, wrong) is False and not progress.path().exists()
    assert (
        f"{'ABC'[wrong]} is not right." in box.answers[2].value
        and QUIZ[name][2]["choices"][wrong]["why"] in box.answers[2].value
    )
    box.buttons[0][right[0]].click()
    assert f"<b>{'ABC'[right[0]]} is right.</b>" in box.answers[0].value and box.answers[1].value == ""
    assert progress.read() == {name: {"quiz": [0]}}
    box.buttons[0][(right[0] + 1) % 3].click()
    box.buttons[1][right[1]].click()
    assert progress.read() == {name: {"quiz": [0, 1]}}, "what was right once stays solved"
    assert progress.table().loc[name, "quiz"] == "2 of 3"


def test_in_batch_answers_are_folded_and_nothing_is_kept(reader, monkeypatch):
    monkeypatch.setenv("COURSE_BATCH", "1")
    box = quiz.Quiz("00_start_here")
    shown = box._repr_mimebundle_()
    assert (
        set(shown) == {"text/html", "text/plain"}
        and shown["text/html"].count("<details>") == 3
        and "open" not in shown["text/html"]
    )
    for question in QUIZ["00_start_here"]:
        assert question["question"] in shown["text/plain"]
    progress.add("00_start_here", "quiz", [0])
    assert not progress.path().exists()


def test_questions_are_text_not_html(reader, monkeypatch):
    choices = [{"text": f"<i>{n}</i>", "right": n == 0, "why": "<script>x</script>"} for n in range(3)]
    monkeypatch.setattr(progress, "questions", lambda: {"x": [{"question": "<script>y</script>?", "choices": choices}]})
    box = quiz.Quiz("x")
    box.choose(0, 0)
    assert (
        "<script>" not in box.static() + box.answers[0].value + box.widget.children[0].value
        and "<i>" not in box.static()
    )


def test_every_button_says_which_choice_it_is(reader):
    box = quiz.Quiz("00_start_here")
    assert [button.description for buttons in box.buttons for button in buttons] == [
        f"{n} {letter}" for n in (1, 2, 3) for letter in "ABC"
    ]
    assert box.buttons[1][2].tooltip == QUIZ["00_start_here"][1]["choices"][2]["text"]


def test_a_widget_of_an_older_ipywidgets_is_shown_too(reader):
    class Old:
        model_id = "abc"

    shown = widgets.view(Old())
    assert shown["application/vnd.jupyter.widget-view+json"] == {
        "version_major": 2,
        "version_minor": 0,
        "model_id": "abc",
    }
    assert set(widgets.view(quiz.Quiz("00_start_here").widget)) == set(shown)


def test_a_notebook_without_a_quiz():
    with pytest.raises(ValueError, match="no quiz for '99'.*00_start_here"):
        quiz.Quiz("99")


def test_a_solved_exercise_is_kept_under_its_notebook(reader, monkeypatch, capsys):
    def test_thing(function):
        assert function(1) == 2

    cell = inspect.cleandoc("\n" + inspect.getsource(test_thing)) + "\nexercises.check(thing, test_thing)"
    cells = [{"cell_type": "code", "source": [cell]}]
    (reader / "55_x.ipynb").write_text(json.dumps({"cells": cells}))
    monkeypatch.setattr(files, "notebooks", lambda: [reader / "55_x.ipynb"])
    assert exercises.check(lambda x: x, test_thing) is False and not progress.path().exists()
    assert exercises.check(lambda x: 2 * x, test_thing) is True
    assert progress.read() == {"55_x": {"exercises": ["thing"]}}
    assert progress.table().loc["55_x", "exercises"] == "1 of 1"


def test_a_solution_cell_and_a_test_of_ones_own_are_no_progress(reader):
    def own(function):
        assert function(1) == 2

    assert exercises.check(lambda x: 2 * x, own) is True
    exercises.require(lambda x: 2 * x, own)
    progress.add_exercise("")
    assert not progress.path().exists()


def test_every_exercise_of_the_course_is_counted():
    counted = progress.exercises()
    assert set(counted) == {path.stem for path in pages.paths()} and all(
        2 <= len(names) <= 3 for names in counted.values()
    )


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}', '{"a": {"other": []}}', '{"a": {"quiz": 1}}'])
def test_a_broken_file_is_named_and_never_stops_a_check(reader, capsys, text):
    progress.path().write_text(text)
    with pytest.raises(progress.ProgressError, match="course_progress.json.*delete it"):
        progress.read()
    progress.add("00_start_here", "quiz", [0])
    assert "Progress is not kept" in capsys.readouterr().out and progress.path().read_text() == text


def test_many_writers_lose_nothing(reader):
    threads = [threading.Thread(target=progress.add, args=("00_start_here", "quiz", [number])) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(progress.read()["00_start_here"]["quiz"]) == list(range(8))
    assert [path.name for path in reader.iterdir() if path.name.startswith("..")] == []


def test_an_unknown_kind(reader):
    with pytest.raises(ValueError, match="exercises or quiz"):
        progress.add("00_start_here", "grades", [1])
