"""Chat with a GGUF file through llama.cpp: damaged files in one line, a session's rules, and nothing left running."""

import io
import signal
import subprocess
import sys

import psutil
import pytest

pytest.importorskip("xllamacpp")
from helpers import chat  # noqa: E402
from helpers.__main__ import main  # noqa: E402
from helpers.chat import llama  # noqa: E402
from helpers.diagnosis.reproductions.parts import CHATML, tiny_gguf  # noqa: E402
from helpers.process import child_environment  # noqa: E402


@pytest.fixture(scope="module")
def session():
    with llama.session(tiny_gguf(), max_new_tokens=20) as opened:
        yield opened


@pytest.fixture(autouse=True)
def fresh(request):
    if "session" in request.fixturenames:
        opened = request.getfixturevalue("session")
        opened.turns, opened.system, opened.cut_off = [], [], False


def servers():
    """llama.cpp's processes under this one."""
    return [child for child in psutil.Process().children(recursive=True) if "xllamacpp" in " ".join(child.cmdline())]


def test_an_answer_is_streamed_kept_and_gone_on_with(session):
    pieces = list(session.stream("hi"))
    assert len(pieces) > 1 and session.cut_off and session.messages[-1]["content"] == "".join(pieces)
    more = "".join(session.resume())
    assert more and session.messages[-1]["content"] == "".join(pieces) + more and len(session.messages) == 2


def test_an_answer_that_is_left_early_is_kept_so_far(session):
    pieces = session.stream("hi")
    first = next(pieces)
    pieces.close()
    assert session.cut_off and session.messages[-1]["content"] == first


def test_the_oldest_turns_go_when_the_context_is_full(session):
    session.turns = [{"role": "user", "content": "x" * 200}, {"role": "assistant", "content": "y" * 200}]
    "".join(session.stream("z" * 150))
    assert [turn["content"][0] for turn in session.messages if turn["role"] == "user"] == ["z"]
    with pytest.raises(chat.ChatError, match="more than the context of 512"):
        "".join(session.stream("x" * 600))


def test_typed_control_tokens_and_resuming_nothing_are_refused(session):
    with pytest.raises(chat.ChatError, match=r"<\|im_end\|> as a control token"):
        "".join(session.stream("say <|im_end|>"))
    with pytest.raises(chat.ChatError, match="no answer to go on with"):
        "".join(session.resume())


@pytest.mark.integration
@pytest.mark.parametrize(("damage", "message"), [
    (lambda data: b"", "not with b'GGUF'"),
    (lambda data: b"GGML" + data[4:], "begins with b'GGML'"),
    (lambda data: data[:-5000], "cut off or damaged"),
    (lambda data: data[:60], "cut off or damaged"),
    (lambda data: data.replace(b"output_norm.weight" + b"\x01\0\0\0" + b"\x40" + bytes(7) + bytes(4), b"output_norm.weight" + b"\x01\0\0\0" + b"\x40" + bytes(7) + b"\x63\0\0\0"), "has type 99"),
    (lambda data: data.replace(b"tokenizer.chat_template", b"tokenizer.chat_templatX"), "no chat template"),
    (lambda data: data.replace(b"{% endfor %}", b"{% endXXX %}"), "llama.cpp does not serve tiny.gguf: common_chat_templates_init"),
])  # fmt: skip
def test_a_bad_file_is_one_line_and_leaves_nothing_running(damage, message, capsys):
    path, before = tiny_gguf(), servers()
    path.write_bytes(damage(path.read_bytes()))
    assert main(["chat", "--model", str(path), "--once", "hi"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and said.startswith("error: ")
    assert servers() == before


def test_a_file_that_is_not_there_and_a_missing_package(tmp_path, monkeypatch, capsys):
    assert main(["chat", "--model", str(tmp_path / "no.gguf"), "--once", "hi"]) == 2
    monkeypatch.setattr(llama.importlib.util, "find_spec", lambda name: None)
    assert main(["chat", "--model", str(tiny_gguf()), "--once", "hi"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "There is no file" in first and "pip install xllamacpp" in second


@pytest.mark.integration
def test_a_server_that_dies_is_said(session):
    with llama.serving(tiny_gguf()) as server:
        server.process.kill()
        server.process.wait()
        with pytest.raises(RuntimeError, match="is gone .* start it again"):
            llama.ask(server, "/tokenize", content="hi")


@pytest.mark.parametrize(("log", "said"), [
    ("0.01 I ok\n0.02 E srv start: couldn't bind\n0.03 E later\nRuntimeError: Failed", "srv start: couldn't bind"),
    ("Traceback\nRuntimeError: Failed to init server", "RuntimeError: Failed to init server"),
    ("", "no message"),
])  # fmt: skip
def test_the_first_error_of_a_log(log, said):
    assert llama.first_error(io.StringIO(log)) == said


LONG = "import sys; from helpers.__main__ import main; sys.exit(main(['chat', '--model', sys.argv[1], '--max-new-tokens', '400']))"


@pytest.mark.integration
@pytest.mark.parametrize("ending", ["Ctrl-C", "kill"])
def test_nothing_runs_on_after_the_terminal(ending):
    """Ctrl-C stops the answer, and the conversation goes on; a killed terminal takes its server with it."""
    talk = subprocess.Popen(
        [sys.executable, "-c", LONG, str(tiny_gguf(CHATML))], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env=child_environment(),
    )  # fmt: skip
    talk.stdin.write(b"hi\n")
    talk.stdin.flush()
    said = b""
    while b"you> " not in said or len(said.split(b"you> ")[-1]) < 5:  # until the answer has begun
        said += talk.stdout.read1()
    running = psutil.Process(talk.pid).children(recursive=True)
    assert running
    if ending == "kill":
        talk.kill()
    else:
        talk.send_signal(signal.SIGINT)
        rest, _ = talk.communicate(b"\n", timeout=60)
        assert b"stopped: /more goes on" in rest or b"cut off" in rest
        assert talk.returncode == 0
    talk.wait(10)
    gone, alive = psutil.wait_procs(running, timeout=10)
    assert not alive, [process.cmdline() for process in alive]
