"""What notebook 11 and the report stand on: the frontier, the table, the decision guide, the report, the harness's task."""

import json
from collections import Counter

import bs4
import pytest
import yaml
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from test_claims import record

from helpers import files, memory, models
from helpers.publishing import guide, pareto, reference, report, run, tables

# The frontier


@pytest.mark.parametrize(
    ("points", "more", "expected"),
    [
        ([(1, 3.0), (2, 1.0), (3, 2.0), (4, 0.5)], False, [0, 1, 3]),
        ([(1, 3.0), (2, 1.0), (3, 2.0), (4, 0.5)], True, [3]),
        ([(1, 1.0), (1, 1.0)], False, [0]),
        ([(1, 2.0), (1, 1.0)], False, [1]),
        ([(2, 1.0), (1, 1.0)], True, [0]),
        ([], False, []),
    ],
)
def test_frontier(points, more, expected):
    assert pareto.frontier(points, more) == expected


POINTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12)


@given(POINTS, st.booleans())
def test_frontier_is_what_nothing_beats(points, more):
    def beats(a, b):
        first = a[0] >= b[0] if more else a[0] <= b[0]
        return first and a[1] <= b[1] and a != b

    kept = {points[n] for n in pareto.frontier(points, more)}
    assert kept == {point for point in points if not any(beats(other, point) for other in points)}


def test_plot_says_what_it_shows():
    shown = [
        record(method, weight_bytes=size * 1e6, kl_divergence=kl)
        for method, size, kl in (("fp32", 500, 0.0), ("nf4", 100, 0.3), ("bad", 200, 1.5))
    ]
    fig, alt, table = pareto.plot(shown)
    assert alt.endswith("no other method beats: nf4, fp32.") and "3 methods" in alt
    assert table.set_index("method")["on the frontier"].to_dict() == {"fp32": "yes", "nf4": "yes", "bad": "no"}
    assert pareto.plot(shown[:1]) is None
    assert pareto.plot([record("a", decode_tokens_per_s=None), record("b")], "decode_tokens_per_s") is None


@pytest.mark.parametrize(("method", "bits"), [("gptq-3", 3), ("autoround-2", 2), ("fp8-weight-only", 8), ("mxfp4", 4), ("nvfp4", 4), ("nf4-single", 4), ("rtn-int4-asym", 4),
    ("int8-dynamic-torchao", 8), ("gguf-q2_k", 2), ("gguf-q4_k_m-imatrix", 4), ("bf16", 16), ("bf16-kv4", 16), ("fp32", 32), ("autoawq", 4), ("hybrid-int4", None), ("ternary", 2)])  # fmt: skip
def test_bits_of_a_method_are_in_its_name(method, bits):
    assert pareto.bits(method) == bits


def test_no_label_hides_a_point_of_the_crowded_panel(committed):
    from matplotlib.text import Text

    fig, _, _ = pareto.plot(list(committed.records.values()))
    fig.canvas.draw()
    panel = fig.axes[1]
    points = [panel.transData.transform(dot.get_offsets()[0]) for dot in panel.collections]
    labels = {text.get_text(): Text.get_window_extent(text) for text in panel.texts}
    assert len(labels) == len(points) > 8
    assert [name for name, box in labels.items() if any(box.contains(*point) for point in points)] == []
    assert all(panel.bbox.y0 < box.y0 and box.y1 < panel.bbox.y1 for box in labels.values()), "a label leaves the panel"


def test_the_readme_takes_two_panels_and_no_label_of_the_third():
    shown = [
        record(method, weight_bytes=size * 1e6, kl_divergence=kl)
        for method, size, kl in (
            ("bf16", 270, 0.001),
            ("nf4", 112, 0.3),
            ("awq", 114, 0.15),
            ("gptq-3", 99, 0.9),
            ("rtn-3", 99, 1.9),
        )
    ]
    fig, _, _ = pareto.plot(shown, most=2)
    assert [ax.get_title() for ax in fig.axes] == ["All methods", "4 bits"]
    assert "rtn-3" not in {text.get_text() for ax in fig.axes for text in ax.texts}


def test_what_lies_below_four_bits_has_a_panel_of_its_own():
    shown = [
        record(method, weight_bytes=size * 1e6, kl_divergence=kl)
        for method, size, kl in (("bf16", 270, 0.001), ("nf4", 112, 0.3), ("awq", 114, 0.15))
    ]
    fig, alt, _ = pareto.plot(shown)
    assert [ax.get_title() for ax in fig.axes] == ["All methods", "4 bits"] and alt.startswith(
        "The closest 4-bit method outside GGUF files, awq, takes 42% of bf16's bytes"
    )
    shown += [
        record(method, weight_bytes=9e7, kl_divergence=kl) for method, kl in (("gptq-2", 3.0), ("autoround-3", 0.5))
    ]
    fig, *_ = pareto.plot(shown)
    assert [ax.get_title() for ax in fig.axes] == ["All methods", "4 bits", "Below 4 bits"]
    assert {text.get_text() for text in fig.axes[2].texts} == {"gptq-2", "autoround-3"}


def test_fine_tuned_models_are_not_on_the_frontier():
    shown = [
        record(method, weight_bytes=size * 1e6, kl_divergence=kl)
        for method, size, kl in (
            ("fp32", 500, 0.0),
            ("nf4", 100, 0.3),
            *((name, 50, 0.1) for name in pareto.FINE_TUNED),
        )
    ]
    _, alt, table = pareto.plot(shown)
    assert list(table.method) == ["fp32", "nf4"] and "qlora" not in alt
    assert pareto.plot(shown[1:]) is None


# How two models rank the methods

SMALL, LARGE = "small (hub)", "large (hub)"


def ranked_records(model, device="2 CPU cores, x86_64", **kl):
    """{method: record} with an interval of 10 % to each side."""
    return {
        name.replace("_", "-"): record(
            name.replace("_", "-"), device, model=model, kl_divergence=value, kl_low=0.9 * value, kl_high=1.1 * value
        )
        for name, value in kl.items()
    }


def of_course(device, model, found):
    return reference.Reference(device, model, "2026-11-25", found)


def test_a_ranking_takes_the_four_bit_methods_of_real_models():
    found = ranked_records(SMALL, nf4=0.3, awq=0.1, bf16=0.001, qlora=0.2, hybrid_int4=0.05)
    found["gptq"] = record("gptq", model=SMALL, kl_divergence=0.2, kl_low=None, kl_high=None)
    shape = of_course(
        "NVIDIA H100",
        "shape",
        ranked_records("shape (random weights, made here)", "NVIDIA H100", nf4=0.9, awq=0.1, gptq=0.2),
    )
    ranked = pareto.rankings(found, [shape])
    assert {model: [r["method"] for r in group] for model, group in ranked.items()} == {"small": ["awq", "nf4"]}
    assert pareto.rankings({}) == {}


def test_a_models_ranking_is_of_the_device_with_the_most_methods():
    more = of_course("NVIDIA H100", SMALL, ranked_records(SMALL, "NVIDIA H100", nf4=0.3, awq=0.1, gptq=0.2))
    few, same = ranked_records(SMALL, nf4=0.31), ranked_records(SMALL, nf4=0.31, awq=0.11, gptq=0.21)
    for measured, expected in ((few, "NVIDIA H100"), (same, "2 CPU cores, x86_64"), ({}, "NVIDIA H100")):
        assert {r["device"] for r in pareto.rankings(measured, [more])["small"]} == {expected}


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((0.1, 0.2), (0.3, 0.4), -1),
        ((0.3, 0.4), (0.1, 0.2), 1),
        ((0.1, 0.3), (0.2, 0.4), 0),
        ((0.1, 0.2), (0.2, 0.3), 0),
    ],
)
def test_only_intervals_apart_make_an_order(first, second, expected):
    one, other = (dict(zip(("kl_low", "kl_high"), ends)) for ends in (first, second))
    assert pareto.order(one, other) == expected and pareto.order(other, one) == -expected


def test_differences_of_two_models_in_words():
    small = ranked_records(SMALL, awq=0.1, gptq=0.2, nf4=0.4, fp4=0.41)
    large = of_course(
        "NVIDIA H100", LARGE, ranked_records(LARGE, "NVIDIA H100", nf4=0.1, gptq=0.2, awq=0.21, autoawq=0.3)
    )
    # small: awq < gptq < nf4; large: nf4 before the two others, which it does not tell apart.
    said = pareto.differences(pareto.rankings(small, [large]))
    assert said == (
        "Of 3 pairs of methods, small and large put 0 in the same order and 2 in opposite orders: awq beats nf4 on small, nf4 beats awq on large; "
        "gptq beats nf4 on small, nf4 beats gptq on large. Told apart by one model alone: 1 (small), 0 (large); by neither: 0."
    )
    large = of_course("GPU", LARGE, ranked_records(LARGE, "GPU", awq=0.01, gptq=0.02, nf4=0.04, fp4=0.041))
    alike = pareto.differences(pareto.rankings(small, [large]))
    assert alike.startswith(
        "Of 6 pairs of methods, small and large put 5 in the same order and 0 in opposite orders. "
    ) and alike.endswith("by neither: 1.")


def test_one_model_or_none_is_said():
    assert pareto.differences({}).startswith("No record") and pareto.plot_rankings({}) is None
    ranked = pareto.rankings(ranked_records(SMALL, nf4=0.3, awq=0.1))
    fig, alt, table = pareto.plot_rankings(ranked)
    assert len(fig.axes) == 1 and "Only small has records" in alt
    assert list(table["small"]) == ["awq: 0.100 [0.090, 0.110]", "nf4: 0.300 [0.270, 0.330]"]
    lonely = pareto.rankings(
        ranked_records(SMALL, nf4=0.3), [of_course("GPU", LARGE, ranked_records(LARGE, "GPU", awq=0.1))]
    )
    assert "share fewer than two methods" in pareto.differences(lonely)


def test_the_picture_has_a_panel_a_model_on_a_log_axis_with_the_intervals():
    large = of_course("GPU", LARGE, ranked_records(LARGE, "GPU", nf4=0.1, awq=0.2, gptq=0.0))
    fig, alt, table = pareto.plot_rankings(pareto.rankings(ranked_records(SMALL, nf4=0.3, awq=0.1), [large]))
    first, second = fig.axes
    assert first.get_xscale() == second.get_xscale() == "log"
    assert [label.get_text() for label in first.get_yticklabels()] == ["awq", "nf4"]
    (_, _, (bar,)) = first.containers[1]
    assert bar.get_segments()[0][:, 0] == pytest.approx([0.27, 0.33])
    assert "small: awq, nf4; large: gptq, nf4, awq." in alt and "awq beats nf4 on small, nf4 beats awq on large" in alt
    assert list(table.columns) == ["small", "large"] and list(table["small"])[2] == ""


# The table of all methods


def cells(page):
    """The texts of a table's cells, row by row."""
    return [[cell.get_text() for cell in row(["td", "th"])] for row in bs4.BeautifulSoup(page, "html.parser")("tr")]


def test_a_method_that_was_not_run_has_no_numbers():
    found = {"nf4": record("nf4", weight_bytes=1e8, perplexity=None), "bf16": record("bf16", weight_bytes=2e8)}
    heads, *rows = cells(tables.methods(found, {"gptq": "05_gptq", "nf4": "04"}, sort_by="weight_bytes"))
    assert [row[0] for row in rows] == ["nf4", "bf16", "gptq"] and all(len(row) == len(heads) for row in rows)
    assert rows[2][2] == "not run here" and set(rows[2][3:]) == {""}, "never a zero"
    assert rows[0][heads.index("perplexity")] == "–"


def test_the_table_shows_kl_with_its_interval_and_sorts_by_the_number():
    second = {"text": "pydoc", "tokens": 2048, "perplexity": 9.0, "kl_divergence": 0.21, "top1_agreement": 0.9}
    found = {
        "nf4": record("nf4", kl_divergence=0.3274, kl_low=0.3121, kl_high=0.3431, in_domain=second),
        "bf16": record("bf16", kl_divergence=0.00123, kl_low=0.0011, kl_high=0.00135),
        "fp32": record("fp32", kl_divergence=-1e-6, kl_low=None, kl_high=None),
    }
    page = tables.methods(found, sort_by="kl_divergence")
    heads, *rows = cells(page)
    column = heads.index("KL")
    assert [row[column] for row in rows] == ["0.0000", "0.0012 [0.0011, 0.0014]", "0.327 [0.312, 0.343]"]
    assert 'data-v="0.3274"' in page and [row[heads.index("KL on pydoc")] for row in rows] == ["–", "–", "0.210"]
    assert [row[0] for row in cells(tables.methods(found, sort_by="in_domain"))[1:]][0] == "nf4", (
        "what was not measured comes last"
    )


@pytest.mark.parametrize(("sort_by", "expected"), [("kl_divergence", ["b", "a", "c"]), ("method", ["a", "b", "c"])])
def test_table_is_sorted_without_a_script(sort_by, expected):
    found = {
        "a": record("a", kl_divergence=0.5),
        "b": record("b", kl_divergence=0.0),
        "c": record("c", kl_divergence=None),
    }
    assert [row[0] for row in cells(tables.methods(found, sort_by=sort_by))[1:]] == expected
    with pytest.raises(ValueError, match="sort_by must be"):
        tables.methods(found, sort_by="beauty")


def test_table_escapes_and_is_labelled():
    page = tables.table(["<b>"], [[("<script>alert(1)</script>", '"><img>')]], 'a "title"')
    assert "<script" not in page and "<img" not in page and "<b>" not in page
    assert 'aria-label="a &quot;title&quot;"' in page and 'scope="col"' in page and "<caption>" in page


# The decision guide


@pytest.fixture(scope="module")
def measured(committed):
    return committed.records


def test_guide_prefers_quality_where_everything_fits(measured):
    assert guide.choose(measured, 64).method == "fp32"
    assert guide.choose(measured, 24).method == "bf16"


def test_guide_never_offers_what_does_not_fit_or_ruins_the_model(measured):
    for memory_gb in (6, 8, 10, 16, 24, 40, 64):
        for need in guide.NEEDS:
            for hardware in guide.HARDWARE:
                advice = guide.choose(measured, memory_gb, hardware, need=need)
                assert guide.bytes_needed(measured[advice.method], "Mistral-7B") <= memory_gb * 1e9
                assert measured[advice.method]["kl_divergence"] < guide.USABLE and advice.method != "int8-dynamic"
                assert (
                    advice.notebook == measured[advice.method]["notebook"][:2] and f"{memory_gb:g} GB" in advice.reason
                )


def test_guide_follows_the_records(measured):
    """A method needs no line in the guide: its record says how many bits a weight takes, on any model."""
    bits = {method: guide.linear_bits(record) for method, record in measured.items()}
    known = {"gptq-3": 3.297, "gptq-rotated-3": 3.297, "hqq-4": 4.5, "mxfp4": 4.25, "int4-g64": 4.25, "llm-int8": 8}
    assert {method: bits[method] for method in known} == pytest.approx(known, rel=0.01)
    assert bits["qlora"] is None and bits["rtn-int4"] is None, "fine-tuned, or without bytes"
    offered = {r["notebook"][:2] for m, r in measured.items() if bits[m] and r["kl_divergence"] < guide.USABLE}
    assert {"08", "09", "10"} <= offered
    only = {"mine-3": measured["gptq-3"] | {"method": "mine-3", "kl_divergence": 0.1}}
    advice = guide.choose(only, 8)
    assert advice.method == "mine-3" and advice.notebook == "10" and "speed was not measured" in advice.reason
    linear = memory.predict(models.mistral_config(), bits=16).weights / 2
    wanted = linear * 3.297 / 8 + 2 * 2 * 32768 * 4096
    assert guide.bytes_needed(only["mine-3"], "Mistral-7B") == pytest.approx(1.1 * (wanted + 0.54e9), rel=0.02)


def test_guide_says_when_nothing_fits(measured):
    advice = guide.choose(measured, 3)
    assert advice.method is None and advice.notebook == "12" and "you have 3" in advice.reason
    assert guide.choose(measured, 3, size="SmolLM2-135M").method


@pytest.mark.parametrize(("memory_gb", "method"), [(200, "fp32"), (24, "qlora"), (2, None)])
def test_guide_for_fine_tuning(measured, memory_gb, method):
    advice = guide.choose(measured, memory_gb, "NVIDIA GPU", fine_tune=True)
    assert advice.method == method and "GB" in advice.reason


def test_guide_does_not_sell_a_cpus_speed_to_a_gpu(measured):
    advice = guide.choose(measured, 24, "NVIDIA GPU", need="speed")
    assert "tokens/s" not in advice.reason and "no speed was measured on such hardware" in advice.reason
    assert "tokens/s on 2 CPU cores" in guide.choose(measured, 24, "CPU", need="speed").reason


@pytest.mark.parametrize(
    "wrong", [{"hardware": "TPU"}, {"need": "beauty"}, {"size": "GPT-4"}, {"memory_gb": 0}, {"memory_gb": float("nan")}]
)
def test_guide_refuses_what_is_no_choice(measured, wrong):
    with pytest.raises(ValueError, match="must be"):
        guide.choose(measured, **{"memory_gb": 8, **wrong})
    with pytest.raises(ValueError, match="no record of a method"):
        guide.choose({}, 8)


def test_guide_widget_answers_and_is_labelled(measured, monkeypatch):
    monkeypatch.delenv("COURSE_BATCH", raising=False)
    widget = guide.Guide(measured)
    before = widget.answer.value
    widget.memory.value = 64
    assert "bf16" in before or "int8" in before
    assert "<b>fp32</b>" in widget.answer.value and 'aria-live="polite"' in widget.answer.value
    assert all(
        control.description for control in (widget.size, widget.memory, widget.hardware, widget.need, widget.fine_tune)
    )
    assert "application/vnd.jupyter.widget-view+json" in widget._repr_mimebundle_()


def test_guide_without_a_front_end(measured, monkeypatch):
    monkeypatch.setenv("COURSE_BATCH", "1")
    bundle = guide.Guide(measured)._repr_mimebundle_()
    assert (
        set(bundle) == {"text/plain", "text/html"} and bundle["text/plain"].count("\n") == len(guide.Guide.EXAMPLES) - 1
    )
    assert "Mistral-7B in 8 GB" in bundle["text/html"]


def test_guide_without_records_says_what_to_run(monkeypatch):
    monkeypatch.delenv("COURSE_BATCH", raising=False)
    with pytest.raises(ValueError, match="run notebooks"):
        repr(guide.Guide({}))
    assert "run notebooks 00 to 06" in guide.Guide({}).answer.value


# The report


def test_report_of_a_full_run(tmp_path, measured):
    for method, facts in measured.items():
        files.write_text(tmp_path / "records" / f"{method}.json", json.dumps(facts))
    path = report.write(
        tmp_path,
        [run.Result("04_nf4_bitsandbytes", 61.0, 10**9, "ok"), run.Result("05_gptq", 9.0, 10**9, "cell 1: <b>")],
    )
    page = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 3_000_000 and page.count("data:image/png;base64,") == 2
    assert "src=" not in page.replace('src="data:', "") and "http" not in page, "one page, readable without a network"
    assert "cell 1: &lt;b&gt;" in page and "1 of 2 ok" in page and "<td>70</td>" in page
    for claim in ("quantized models have fewer parameters to load", "needs hardware not present"):
        assert claim in page
    assert all(f'<td style="text-align:left">{method}</td>' in page for method in measured)
    of_this_run, behind = page.split('<h2 id="references">')
    assert "not run here</td>" not in of_this_run and "<details><summary>2 CPU cores" in behind
    assert page.index("<img ") < page.index("All methods of this run"), "pictures first"


def test_report_leaves_fine_tuned_models_out_of_the_plots_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "FOLDER", tmp_path / "none")
    for method, kl in (("nf4", 0.3), ("bf16", 0.1), ("qlora", 0.5)):
        files.write_text(
            tmp_path / "records" / f"{method}.json", json.dumps(record(method, kl_divergence=kl, weight_bytes=1e8))
        )
    page = report.write(tmp_path, []).read_text(encoding="utf-8")
    assert (
        page.count("Not in the plot: qlora. Fine-tuning is meant to leave") == 2
        and page.count("data:image/png;base64,") == 2
    )
    assert "<summary>2 CPU cores" not in page and "8,192 tokens of course in windows of 256" in page


def test_report_needs_no_results_to_come_with_the_course(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "FOLDER", tmp_path / "none")
    page = report.write(tmp_path, []).read_text(encoding="utf-8")
    assert "no records" in page and "Not in the plot" not in page


def test_report_of_an_empty_run_shows_what_was_not_run(tmp_path, committed):
    page = report.write(tmp_path, [run.Result("04", 1.0, 10**9, "ok")]).read_text(encoding="utf-8")
    table = page.split('<h2 id="references">')[0]
    assert "nf4" in table and "not run here" in table and "data:image/png" not in page
    assert "Reference: 2 CPU cores" in page and "committed run" in page


# The harness's task

TASK = ROOT / "notebooks" / "data" / "course_questions"


def test_questions_are_fair():
    questions = [json.loads(line) for line in (TASK / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len({q["question"] for q in questions}) == len(questions)
    assert all(
        len(set(q["choices"])) == 4 and q["answer"] in range(4) and q["question"].endswith("?") for q in questions
    )
    assert set(Counter(q["answer"] for q in questions).values()) == {len(questions) // 4}, (
        "every position is right equally often"
    )
    for subject in ("quantization", "general"):
        part = [q for q in questions if q["subject"] == subject]
        right = sum(len(q["choices"][q["answer"]]) for q in part) / len(part)
        wrong = sum(len(choice) for q in part for n, choice in enumerate(q["choices"]) if n != q["answer"]) / (
            3 * len(part)
        )
        assert 0.85 < right / wrong < 1.18, "the length of an answer must not give it away"


def test_the_harness_takes_the_task():
    from lm_eval.tasks import TaskManager

    task = yaml.safe_load((TASK / "course_questions.yaml").read_text(encoding="utf-8"))
    files = task["dataset_kwargs"]["data_files"]
    files.update({split: str(TASK / name) for split, name in files.items()})
    loaded = TaskManager().load(task)["tasks"]["course_questions"]
    docs = list(loaded.test_docs())
    assert len(docs) == len((TASK / "questions.jsonl").read_text(encoding="utf-8").splitlines())
    assert loaded.doc_to_text(docs[0]).startswith("Question: ") and loaded.doc_to_text(docs[0]).endswith("?\nAnswer:")
    assert loaded.doc_to_choice(docs[0]) == docs[0]["choices"] and loaded.doc_to_target(docs[0]) == docs[0]["answer"]


def test_what_notebook_11_says_of_the_cache_of_two_models():
    study = json.loads((ROOT / "notebooks" / "kv_cache" / "cache_study.json").read_text(encoding="utf-8"))
    small, large = (study["models"][name] for name in ("SmolLM2-135M-Instruct", "Qwen2.5-Coder-1.5B-Instruct"))
    assert (round(small["largest_key_channel"]), round(large["largest_key_channel"])) == (16, 284)
    token, channel = (large["rows"][f"4 bits, keys per {way}"] for way in ("token", "channel"))
    assert round(large["rows"]["16 bits"]["perplexity"]) == 36 and round(token["perplexity"]) == 166
    assert round(channel["kl_divergence"], 3) == 0.002 and channel["kl_high"] < 0.01 < token["kl_low"]
    fp8 = large["rows"]["fp8 (transformers)"]
    assert round(fp8["kl_divergence"], 3) == 0.094 and channel["kl_high"] < fp8["kl_low"]
    for facts in study["models"].values():
        rows = facts["rows"]
        for bits in (2, 4):
            assert rows[f"{bits} bits, keys per channel"]["kl_high"] < rows[f"{bits} bits, keys per token"]["kl_low"]
        assert all(row["kl_low"] <= row["kl_divergence"] <= row["kl_high"] for row in rows.values())
