"""Command line of the course: `python -m helpers doctor | explain | chat | run | book | reference | notebooks | links`."""

import argparse
import json
import sys

from helpers import process

MODEL_HELP = '"auto", "smollm2-offline", "qwen2.5-coder-1.5b-offline", "mistral-7b-geometry", a hub id, or a folder'


def main(argv: list[str] | None = None) -> int:
    """Run one command; its exit code."""
    process.prepare()
    parser = argparse.ArgumentParser(prog="python -m helpers", description="Tools of the quantization course")
    commands = parser.add_subparsers(dest="command", required=True)

    doctor = commands.add_parser("doctor", help="can this machine run the course?")
    doctor.add_argument(
        "--json",
        action="store_true",
        help="for bug reports and CI; exit codes: 0 runs, 1 cannot, 2 wrong call, 3 small model only",
    )
    doctor.add_argument("--model", default="auto", help=MODEL_HELP)
    doctor.add_argument("--only", nargs="+", metavar="NN", help="beginnings of notebook names, e.g. 00 04")

    explain = commands.add_parser(
        "explain", help="what does this traceback mean? (exit code 0: known, 1: unknown, 2: nothing to read)"
    )
    explain.add_argument(
        "file", nargs="?", metavar="FILE", help="a text with the traceback; without it, or with -, standard input"
    )

    chat = commands.add_parser("chat", help="talk to a model in the terminal")
    chat.add_argument("--model", default="auto", help=f"{MODEL_HELP}, or a GGUF file, which llama.cpp runs")
    chat.add_argument("--once", metavar="TEXT", help="one question, one answer, then exit")
    chat.add_argument("--system", help="system message")
    chat.add_argument("--max-new-tokens", type=int, default=128)
    chat.add_argument(
        "--sample",
        action="store_true",
        help="draw answers as the model's generation config says, instead of the likeliest tokens",
    )
    chat.add_argument("--temperature", type=float, help="draw with this temperature (0: the likeliest tokens)")
    chat.add_argument("--top-p", type=float, help="draw from the likeliest tokens that make up this share")
    chat.add_argument("--seed", type=int, help="repeat the same draws")
    chat.add_argument(
        "-t", "--template-argument", action="append", default=[], metavar="NAME=VALUE",
        help="argument of the chat template, the value as JSON or text, e.g. enable_thinking=false",
    )  # fmt: skip

    run = commands.add_parser("run", help="execute the notebooks with papermill")
    run.add_argument("--only", nargs="+", metavar="NN", help="beginnings of notebook names, e.g. 00 04")
    run.add_argument("--model", default="auto", help=MODEL_HELP)
    run.add_argument("--output", default="build", help="build folder")
    run.add_argument("--timeout", type=int, default=1800, help="seconds one cell may take")
    run.add_argument("-p", "--parameter", action="append", metavar="NAME=VALUE", help="parameter for every notebook")
    run.add_argument(
        "--cap", metavar="SIZE", help="GPU memory that notebooks may take, e.g. 24GB: tries a smaller card"
    )
    run.add_argument("--in-place", action="store_true", help="store outputs and cost cards in notebooks/ (for authors)")

    book = commands.add_parser("book", help="build a static site of the executed notebooks")
    book.add_argument("--output", default="build", help="build folder")

    reference = commands.add_parser(
        "reference", help="store this build's records and the claims' verdicts in notebooks/data (for authors)"
    )
    reference.add_argument("--output", default="build", help="build folder")

    commands.add_parser(
        "notebooks",
        help="turn notebooks/source/*.py into notebooks, keeping the outputs of unchanged cells (for authors)",
    )

    commands.add_parser("links", help="regenerate badges, cost cards, bootstrap cells and navigation")

    arguments = parser.parse_args(argv)
    try:
        return COMMANDS[arguments.command](arguments) or 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except (
        RuntimeError,
        ValueError,
        OSError,
    ) as error:  # what our own modules raise carries its remedy: no traceback needed
        from helpers import redact

        print(f"error: {redact.redact(str(error))}", file=sys.stderr)
        return 2


def _doctor(arguments):
    try:
        from helpers.diagnosis import doctor
    except ModuleNotFoundError as error:  # the doctor is asked before anything is installed, too
        command = "python -m pip install -r requirements.txt"
        checks = [{"component": "packages", "verdict": "bad", "found": f"missing: {error.name}", "remedy": command}]
        answer = {
            "verdict": "bad",
            "exit_code": 1,
            "sentence": "Not ready: packages.",
            "checks": checks,
            "notebooks": [],
        }
        print(
            json.dumps(answer, indent=2)
            if arguments.json
            else f"[bad ] packages  missing: {error.name}\n       -> {command}"
        )
        return 1
    return doctor.main(arguments.json, arguments.model, arguments.only)


def _explain(arguments):
    from helpers.diagnosis import explain

    return explain.main(arguments.file)


def _run(arguments):
    from helpers.publishing import run

    return run.main(arguments)


def _book(arguments):
    from helpers.publishing import site

    print(site.build(arguments.output))


def _reference(arguments):
    """Records and findings of a build, then the verdicts that follow from them."""
    from helpers.publishing import claims, pages, reference

    for notebook in reference.costs(arguments.output):
        print("cost on a GPU:", notebook)
    for notebook in reference.colab_costs(arguments.output):
        print("cost on Colab:", notebook)
    for path in [*reference.write(arguments.output), *claims.collect(arguments.output)]:
        print(path.relative_to(pages.ROOT))
    for line in claims.fill():
        print(line)
    remaining = claims.problems()
    for line in remaining:
        print("problem:", line)
    return 1 if remaining else 0


def _notebooks(arguments):
    from helpers.publishing import sources

    return sources.main(arguments)


def _links(arguments):
    from helpers.publishing import pages

    pages.refresh_all()


def _chat(arguments):
    from helpers.chat import terminal

    return terminal.main(arguments)


COMMANDS = {
    "doctor": _doctor, "explain": _explain, "chat": _chat, "run": _run, "book": _book, "reference": _reference,
    "notebooks": _notebooks, "links": _links,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
