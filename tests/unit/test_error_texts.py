"""Error texts from public issue threads, shortened and with neutral names: each is explained right or honestly not known.

error_texts/table.json says for each file the thread, the right cause, the catalogue's entries that are right, and whether "I do not know"
is right too. A*, E* and N* are the reports that the catalogue was extended by; T*, U* and W* were collected afterwards. When they were
first tried, 7 of the 28 texts U* were explained right and 21 honestly not known; the catalogue then grew by their families. The same
holds of W*: 2 of 12 right, 9 not known, and 1 (W12) by an entry that spoke of quantized weights only. Of W* only excerpts
were at hand: the last frames of W01, W02, W05 to W09 and W12 are filled in from what the message and the library's layout say.
"""

import json

import pytest
from conftest import ROOT

from helpers.diagnosis import explain

FOLDER = ROOT / "tests" / "unit" / "data" / "error_texts"
TABLE = json.loads((FOLDER / "table.json").read_text(encoding="utf-8"))
RIGHT, UNKNOWN, MISLEADING = "right", "unknown", "misleading"


def text(name):
    return (FOLDER / f"{name}.txt").read_text(encoding="utf-8")


def verdict(name):
    answers = explain.explain(text(name))
    return UNKNOWN if not answers else RIGHT if answers[0].entry.id in TABLE[name]["right"] else MISLEADING


def test_every_text_has_its_row():
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_right_or_honestly_unknown(name):
    found = verdict(name)
    assert found == RIGHT or (found == UNKNOWN and TABLE[name]["unknown"]), (found, TABLE[name])


@pytest.mark.parametrize(("letters", "least"), [("AEN", 0.9), ("T", 0.5), ("U", 0.8), ("W", 0.7)])
def test_confusion_table(letters, least, capsys):
    """How many of a group are right, unknown and misleading."""
    names = [name for name in TABLE if name[0] in letters]
    found = {name: verdict(name) for name in names}
    with capsys.disabled():
        counts = {word: list(found.values()).count(word) for word in (RIGHT, UNKNOWN, MISLEADING)}
        print(f"\n{letters}: {len(names)} texts, {counts}")
        print(*(f"{name:4} {found[name]:10} {TABLE[name]['thread']}" for name in names), sep="\n")
    assert counts[MISLEADING] == 0 and counts[RIGHT] >= least * len(names)


@pytest.mark.parametrize(
    ("name", "parts"),
    {
        "A02": [
            "AssertionError",
            "/home/user/infer.py, line 40",
            "bitsandbytes",
            "bitsandbytes/nn/modules.py, line 373",
        ],
        "T08": ["RuntimeError: b_q_weight type is not kInt", "/home/user/infer.py, line 9", "gptqmodel"],
        "T17": ["has no attribute 'quantize'", "/home/user/quant.py, line 78", "torch"],
    }.items(),
)
def test_not_knowing_shows_root_own_frame_and_library(name, parts):
    printed = " ".join(explain.render(explain.read(text(name))).split())
    assert "I do not know this error" in printed
    assert all(part in printed for part in parts), printed


DRESSES = {
    "torchrun": lambda line: f"[rank0]: {line}",
    "vLLM": lambda line: f"(EngineCore pid=123) ERROR 11-02 10:00:00 [core.py:700] {line}",
    "older vLLM": lambda line: f"ERROR 11-02 10:00:00 core.py:387] {line}",
    "Ray": lambda line: f"(RayWorkerWrapper pid=123, ip=10.0.0.1) {line}",
    "docker's times": lambda line: f"2026-11-02T10:00:00.123456789Z {line}",
    "an exception group": lambda line: f"  | {line}",
    "accelerate test": lambda line: f"stderr: {line}",
    "accelerate launch": lambda line: f"[default0]:[rank0]: {line}",
    "colours": lambda line: f"\x1b[0;31m{line}\x1b[0m",
}


@pytest.mark.parametrize("dress", DRESSES)
def test_dressed_up_it_is_the_same_error(dress):
    changed = {}
    for name in TABLE:
        plain = text(name)
        if not plain.startswith("Traceback") or "RuntimeError: Failed to import" in plain:
            continue
        dressed = "\n".join(map(DRESSES[dress], plain.splitlines()))
        before, after = ([answer.entry.id for answer in explain.explain(version)] for version in (plain, dressed))
        if before != after:
            changed[name] = (before, after)
    assert not changed, changed


LAUNCHER = """Traceback (most recent call last):
  File "/home/user/.venv/bin/torchrun", line 8, in <module>
    sys.exit(main())
  File "/home/user/.venv/lib/python3.12/site-packages/torch/distributed/launcher/api.py", line 264, in launch_agent
    raise ChildFailedError(
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
train.py FAILED
"""
NCCL = """Traceback (most recent call last):
  File "/home/user/train.py", line 9, in <module>
    trainer.train()
  File "/home/user/.venv/lib/python3.12/site-packages/torch/distributed/c10d.py", line 7, in wrapper
    return func(*args, **kwargs)
torch.distributed.DistBackendError: NCCL error: remote process exited or there was a network error
"""


def test_the_first_real_failure_of_several_ranks_counts():
    ranks = [("[rank1]: ", NCCL.splitlines()), ("[rank0]: ", text("E21").splitlines())]
    mixed = [prefix + lines[n] for n in range(20) for prefix, lines in ranks if n < len(lines)]
    assert [answer.entry.id for answer in explain.explain("\n".join(mixed) + "\n" + LAUNCHER)] == [
        "quantized-on-another-device"
    ]


@pytest.mark.parametrize(
    "end", ["KeyboardInterrupt", "SystemExit: 1", "papermill.exceptions.PapermillExecutionError: \n" + "-" * 75]
)
def test_the_end_of_a_run_does_not_hide_its_cause(end):
    whole = (
        text("E21")
        + f'\nTraceback (most recent call last):\n  File "/home/user/run.py", line 3, in <module>\n    main()\n{end}\n'
    )
    assert [answer.entry.id for answer in explain.explain(whole)] == ["quantized-on-another-device"]


def test_what_was_caught_on_the_way_is_not_the_cause():
    caught = "Traceback (most recent call last):\n  File \"/home/user/a.py\", line 1, in f\n    import flash_attn\nModuleNotFoundError: No module named 'flash_attn'\n"
    link = "\nDuring handling of the above exception, another exception occurred:\n\n"
    assert explain.explain(caught + link + text("T20")) == []


@pytest.mark.parametrize(
    "last",
    [
        "Killed",
        "zsh: killed     python train.py",
        "./run.sh: line 3: 4312 Killed                  python train.py",
        "[1]  + 4321 killed     python train.py",
    ],
)
@pytest.mark.parametrize(
    "before",
    [
        "",
        "Error\n",
        "ConfigError\n",
        "RuntimeError: one\n",
        'Traceback (most recent call last):\n  File "/a.py", line 1, in f\nOddError: x\n',
    ],
)
def test_what_the_shell_says_last_is_no_part_of_an_error(before, last):
    answers = explain.explain(before + last)
    assert [answer.entry.id for answer in answers] == ["process-killed"]
    assert explain.explain(text("E21") + last)[0].entry.id == "quantized-on-another-device"


def test_a_warning_in_the_last_line_explains_no_error():
    assert (
        explain.explain(
            "RuntimeError: one of its kind\n\nToken indices sequence length is longer than the specified maximum sequence length"
        )
        == []
    )


def test_a_debuggers_text_has_the_innermost_frame_first():
    frames = [
        '  File "/home/user/.venv/lib/python3.11/site-packages/peft/tuners/lora/model.py", line 5, in f\n    raise ValueError('
    ]
    frames += ['  File "/home/user/train.py", line 3, in <module>\n    main()']
    message = (
        "ValueError: Target modules {'q'} not found in the base model. Please check the target modules and try again."
    )
    shown = (
        "Exception has occurred: ValueError\n" + message.partition(": ")[2] + "\n" + "\n".join(frames) + "\n" + message
    )
    assert [answer.entry.id for answer in explain.explain(shown)] == ["target-modules"]
    assert [frame.package for frame in explain.read(shown).first.stack] == ["", "peft"]


PACKAGES = "/home/user/.venv/lib/python3.12/site-packages"
# A message of the catalogue, raised where it means something else: (the frame that raises, the error)
ELSEWHERE = {
    "an empty reshape of the reader's own": (
        "/home/user/a.py",
        "RuntimeError: cannot reshape tensor of 0 elements into shape [2, 0, -1, 128] because the unspecified dimension size -1 can be any value",
    ),
    "a list that another tokenizer's package read": (
        f"{PACKAGES}/other_tokenizers/tok.py",
        "AttributeError: 'list' object has no attribute 'keys'",
    ),
    "a GPTQ class of the reader's own": ("/home/user/gptq.py", "AttributeError: 'GPTQ' object has no attribute 'H'"),
    "a worker's own time-out": ("/home/user/worker.py", "RuntimeError: Kernel didn't respond in 60 seconds"),
    "accelerate's function in a model's own code": (
        "/home/user/.cache/huggingface/modules/transformers_modules/x/modeling_x.py",
        "NameError: name 'init_empty_weights' is not defined",
    ),
    "peft's class in a script": ("/home/user/a.py", "NameError: name 'PeftModel' is not defined"),
    "a layer of the reader's own": (
        f"{PACKAGES}/torch/nn/modules/module.py",
        "TypeError: MyAttention.forward() missing 1 required positional argument: 'attention_mask'",
    ),
    "a loss function of the reader's own": (
        "/home/user/a.py",
        "TypeError: my_loss() got an unexpected keyword argument 'num_items_in_batch'",
    ),
    "a requirement of another package": (
        f"{PACKAGES}/other/__init__.py",
        "ImportError: numpy>=3 is required for a normal functioning of this module, but found numpy==2.1.",
    ),
    "a server of the reader's own": (
        f"{PACKAGES}/requests/models.py",
        "requests.exceptions.HTTPError: 404 Client Error: Not Found for url: https://api.example.com/v1/models",
    ),
}


@pytest.mark.parametrize("name", ELSEWHERE)
@pytest.mark.parametrize("dress", ["plain", "torchrun", "vLLM", "docker's times"])
def test_the_same_words_elsewhere_are_not_known(name, dress):
    path, error = ELSEWHERE[name]
    code = "raise RuntimeError(said)" if error.startswith("RuntimeError") else "step()"
    frames = f'  File "/home/user/run.py", line 3, in <module>\n    main()\n  File "{path}", line 9, in f\n    {code}\n'
    whole = f"Traceback (most recent call last):\n{frames}{error}"
    dressed = "\n".join(map(DRESSES.get(dress, str), whole.splitlines()))
    assert explain.explain(dressed) == []


def test_triton_ops_is_bitsandbytes_mistake_in_bitsandbytes_only():
    whole = "Traceback (most recent call last):\n  File \"{}\", line 9, in f\n    import triton.ops\nModuleNotFoundError: No module named 'triton.ops'"
    found = [
        explain.explain(whole.format(path))[0].entry.id
        for path in (f"{PACKAGES}/bitsandbytes/triton/x.py", f"{PACKAGES}/other/x.py", "/home/user/a.py")
    ]
    assert found == ["triton-ops", "module-removed", "module-removed"]
