"""Laws of the report page: whole, self-contained, escaped, and honest about what is absent."""

import html.parser
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from growth.receipt import AxisSummary, GradientMap, Liveness, LogitDifference, Receipt, StoredArrays
from growth.t5 import plan_growth
from t5pegasus.config import ModelConfig, RunConfig
from t5pegasus.errors import ArtifactError
from t5pegasus.evaluate.bootstrap import Bootstrap
from t5pegasus.evaluate.results import Pair, Scores, compare_systems, save_evaluation
from t5pegasus.json_files import SCHEMA, write_json
from t5pegasus.report import curves, write_report
from t5pegasus.report.chart import Line, draw_lines, nice_ticks
from t5pegasus.report.runs import group_runs, load_runs

HOSTILE = "</dd><script>alert('x')</script>“&<b onmouseover=y>\u2028"
SMALL = ModelConfig(
    vocab_size=3000, d_model=64, d_kv=8, d_ff=128, num_heads=8, num_encoder_layers=2, num_decoder_layers=2
)
LARGE = ModelConfig(
    vocab_size=3000, d_model=96, d_kv=8, d_ff=256, num_heads=12, num_encoder_layers=3, num_decoder_layers=2
)
VOID = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta"}


class Outline(html.parser.HTMLParser):
    """Checks that tags nest, and collects attributes and text."""

    def __init__(self):
        super().__init__()
        self.open_tags, self.attributes, self.tags, self.words = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def read_page(path: Path) -> Outline:
    outline = Outline()
    outline.feed(path.read_text(encoding="utf-8"))
    outline.close()
    assert outline.open_tags == []
    return outline


def write_lines(path: Path, records) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def write_run(path: Path, model: ModelConfig, steps: range, *, loss=6.0, start_from=None, examples_path=None) -> Path:
    """A run folder as training writes it, without arrays."""
    path.mkdir(parents=True)
    config = RunConfig(model=model).to_json()
    paths = {"run_path": str(path), "examples_path": str(examples_path or "examples"), "heldout_path": None}
    paths["start_from"] = None if start_from is None else str(start_from)
    write_json(path / "config.json", {"schema": SCHEMA, "config": config, **paths})
    start = {"kind": "start", "step": steps.start, "config": config, "num_parameters": 7_000 * model.d_model}
    start |= {
        "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
        "num_devices": 1,
        "device": "cpu",
        "peak_flops_per_device": 1.1e11,
    }
    records = [start | {"peak_source": "measured", "compute_dtype": "float32"} | paths]
    for step in range(steps.start + 10, steps.stop + 1, 10):
        now = loss - 0.35 * math.log(step + 1) + 0.08 * math.sin(step * 1.7)
        records.append(
            {"kind": "train", "step": step, "rows": 8 * step, "loss": now, "accuracy": 0.5 - now / 14, "z_loss": 0.01,
             "grad_norm": 1.2 + 0.3 * math.sin(step), "learning_rate": 5e-3 * min(1, step / 50), "seconds": 4.2,
             "tokens_per_second": 9000.0 + 300 * math.cos(step), "rows_per_second": 19.0, "mfu": 0.31,
             "data_wait_fraction": 0.01}
        )  # fmt: skip
        if step % 100 == 0:
            records.append({"kind": "heldout", "step": step, "loss": now + 0.2, "accuracy": 0.48 - now / 14})
    write_lines(path / "metrics.jsonl", records)
    return path


def write_checkpoint(path: Path, step: int, fingerprint: str, lineage=()) -> Path:
    path.mkdir(parents=True)
    write_json(path / "checkpoint.json", {"schema": SCHEMA, "step": step, "lineage": list(lineage)})
    write_json(path / "manifest.json", {"schema": SCHEMA, "fingerprint": fingerprint, "files": {}})
    return path


def write_growth(path: Path, step: int, source_fingerprint: str) -> Path:
    plan = plan_growth(SMALL, LARGE)
    entry = {"plan": plan.to_json(), "plan_hash": plan.hash, "source_fingerprint": source_fingerprint, "step": step}
    receipt = Receipt(
        plan_hash=plan.hash,
        promise="R",
        level="full",
        evidence="examples/heldout",
        source_parameters=448_000,
        grown_parameters=672_000,
        grown_bytes=8_064_000,
        axes=(AxisSummary("embed", 64, 96, "duplicate (some)", "R", "noise that cancels in what reads it"),),
        arrays=StoredArrays(174, 2_016_000, (), 0.0, "none", 4465, 1.64, "first_moment.token_embedding"),
        num_target_tokens=1437,
        num_permutations=8,
        source_nll=4.021,
        nll_difference=2.4e-9,
        logits={
            "float32": LogitDifference(3.3e-6, 4.1e-7, 4.8e-6, 6e-7, 9.5),
            "bfloat16": LogitDifference(2.2e-2, 4.3e-3, 2.4e-7, 1.6e-8, 9.5, 3e-2, 5e-3),
        },
        gradients=GradientMap(2.7e-15, "decoder.layers.self_attention.query", 1.8e-15, "token_embedding", 2e-15),
        liveness={"embed": Liveness(0, 0, (), 32, 32)},
    )
    costs = {"bytes_read": 5_376_000, "bytes_written": 8_064_123, "bytes_found": 0, "surgery_seconds": 0.7,
             "surgery_peak_bytes": 300 * 2**20, "receipt_seconds": 8.1, "receipt_peak_bytes": None}  # fmt: skip
    write_json(path.with_name(path.name + ".costs.json"), {"schema": SCHEMA, **costs})
    write_checkpoint(path, step, "grown", [entry])
    write_json(path / "receipt.json", receipt.to_json())
    return path


def write_examples(path: Path, *, documents=None) -> Path:
    path.mkdir(parents=True)
    documents = documents or {"read": 150, "kept": 140, "dropped": {"too short": 8, "duplicate": 2}}
    counts = [int(40 * math.exp(-((index - 9) ** 2) / 20)) for index in range(24)]
    manifest = {
        "schema": SCHEMA, "kind": "examples", "fingerprint": f"print of {path.name}", "num_examples": sum(counts),
        "num_source_tokens": 31_000, "num_target_tokens": 9_000, "max_source_tokens": 371, "max_target_tokens": 96,
        "vocab_size": 3000, "shards": [{}], "documents": documents,
        "length_histograms": {"bin_tokens": 16, "source": counts, "target": counts[6:14]},
    }  # fmt: skip
    write_json(path / "manifest.json", manifest)
    return path


@pytest.fixture
def flow(tmp_path: Path) -> Path:
    """pretrain → grow → continue → finetune, as folders; the last one is returned."""
    examples = write_examples(tmp_path / "examples")
    write_run(tmp_path / "pretrain", SMALL, range(500), examples_path=examples)
    write_checkpoint(tmp_path / "pretrain" / "checkpoints" / "500", 500, "source")
    grown = write_growth(tmp_path / "grown", 500, "source")
    write_run(tmp_path / "continue", LARGE, range(500, 1000), start_from=grown, examples_path=examples)
    last = write_checkpoint(tmp_path / "continue" / "checkpoints" / "1000", 1000, "continued")
    finetune = write_run(
        tmp_path / "finetune",
        LARGE,
        range(300),
        loss=5.0,
        start_from=last,
        examples_path=write_examples(tmp_path / "pairs"),
    )
    pairs = [Pair("鲸", "鲸是哺乳动物。" * 30, "鲸用肺呼吸。"), Pair("猫", "猫会爬树。它也捉鼠。", "猫会爬树")]
    outputs = {"model": [HOSTILE, "猫会上树"], "lead": ["鲸是哺乳动物。", "猫会爬树。"]}
    comparison = compare_systems(pairs, outputs, Bootstrap(20))
    scores = Scores(str(last), 300, None, "dev.jsonl", 2, {"no summary": 3}, 1, 3.5, 0.41,
                    generation={"num_beams": 4}, **comparison.fields)  # fmt: skip
    save_evaluation(finetune, scores, comparison.records)
    return finetune


def test_chain_is_followed_through_growth(flow: Path):
    runs = load_runs([flow])
    assert [run.name for run in runs] == ["pretrain", "continue", "finetune"]
    assert [[run.name for run in group] for group in group_runs(runs)] == [["pretrain", "continue"], ["finetune"]]
    assert [growth.step for growth in runs[1].growths] == [500]


def test_chain_is_followed_after_all_was_moved(flow: Path, tmp_path: Path):
    moved = tmp_path.rename(tmp_path.with_name(tmp_path.name + "-elsewhere"))
    assert [run.name for run in load_runs([moved / flow.name])] == ["pretrain", "continue", "finetune"]


def test_a_run_moved_alone_is_not_taken_for_its_own_parent(flow: Path, tmp_path: Path):
    write_checkpoint(flow / "checkpoints" / "1000", 1000, "tuned")  # the name of the checkpoint it started from
    alone = flow.rename(tmp_path / "alone")
    for name in ("pretrain", "grown", "continue"):
        (tmp_path / name).rename(tmp_path / "examples" / name)
    assert [run.name for run in load_runs([alone])] == ["alone"]
    write_report([alone], tmp_path / "report.html")
    assert "whose run is not here" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_page_is_whole_and_self_contained(flow: Path, tmp_path: Path):
    write_report([flow], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    outline = read_page(tmp_path / "report.html")
    assert not {"script", "link", "img", "iframe", "object"} & set(outline.tags)
    assert not {"src", "href"} & {name for name, _ in outline.attributes}
    assert "url(" not in page
    assert "@import" not in page
    assert not re.search(r"https?://", page)
    assert not re.search(r"\b(nan|inf)\b", page)


def test_seam_and_receipt_are_shown(flow: Path, tmp_path: Path):
    write_report([flow], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "d_model 64 → 96" in page
    assert 'class="seam"' in page
    assert "3.30e-06" in page
    assert "0.69 times" in page
    assert "32 of 32 copies have parted" in page
    assert "300 MiB" in page
    assert "+2.4e-09" in page
    assert "448,000" in page


def test_a_growth_within_a_run_is_a_seam_and_a_row(tmp_path: Path):
    run = write_run(tmp_path / "progressive", SMALL, range(500))
    record = {
        "kind": "growth", "step": 200, "plan_hash": "c0ffee" * 10, "name": "growth stage 1 (step=200:d_model=96)",
        "promise": "R", "source": SMALL.to_json(), "target": LARGE.to_json(), "parameters_before": 448_000,
        "parameters_after": 672_000, "evidence": "examples/heldout", "loss_before": 4.0211, "loss_after": 4.0212,
        "source_flops": 2 * 10**15, "own_flops": 10**9, "flops": 2 * 10**15 + 10**9, "seconds": 3.14, "config": {},
    }  # fmt: skip
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    lines.insert(len(lines) // 2, json.dumps(record))
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_report([run], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    words = read_page(tmp_path / "report.html").words
    assert page.count('<g class="seam">') == 7  # in every figure of the panel
    assert {"d_model 64 → 96", "448k → 672k", "4.0211 → 4.0212", "2e+15", "c0ffeec0ffee"} <= set(words)
    assert f"d_model {LARGE.d_model}" in page  # the model as it is now
    assert "None of these runs" not in page


def test_scores_and_summaries_are_shown(flow: Path, tmp_path: Path):
    write_report([flow], tmp_path / "report.html")
    words = read_page(tmp_path / "report.html").words
    scores = json.loads((flow / "scores.json").read_text(encoding="utf-8"))
    model, lead = (
        [scores["systems"][system]["scores"][f"rouge-{kind}"]["value"] for kind in ("1", "2", "l")]
        for system in ("model", "lead")
    )
    assert " / ".join(f"{figure:.1f}" for figure in model) in words
    assert "F1 in percent; lead baseline " + " / ".join(f"{figure:.1f}" for figure in lead) in words
    short = "2 pairs of dev.jsonl; left out 3: no summary; 1 texts longer than what the model reads"
    assert f"{short}; held-out loss 3.5000 nats per target token" in words
    published = scores["systems"]["lead"]["scores"]["t5-pegasus-rouge-l"]["value"]
    assert {
        f"{lead[2]:.2f} ",
        f"{published:.2f} ",
        "no summary 3",
        "num_beams 4",
        "鲸用肺呼吸。",
        "model minus lead",
    } <= set(words)


def test_best_and_worst_examples_are_shown_once_each(tmp_path: Path):
    pairs = [Pair(f"文{index:02}", "甲乙丙丁戊己庚辛壬癸" * 3, "甲乙丙丁戊己庚辛壬癸") for index in range(11)]
    summaries = ["甲乙丙丁戊己庚辛壬癸"[:index] for index in range(11)]
    comparison = compare_systems(pairs, {"summaries": summaries, "lead": summaries[::-1]}, Bootstrap(20))
    scores = Scores(
        None, None, "written.txt", "dev.jsonl", 11, {}, None, None, None, generation=None, **comparison.fields
    )
    save_evaluation(tmp_path / "scored", scores, comparison.records)
    shown = {}
    for count in (1, 2, 4):
        assert write_report([tmp_path / "scored"], tmp_path / "page.html", count) == []
        page = read_page(tmp_path / "page.html")
        shown[count] = [int(word[1:]) for word in page.words if re.fullmatch(r"文\d\d", word)]
    assert shown == {1: [10, 5, 0], 2: [10, 9, 6, 5, 0, 1], 4: list(range(10, -1, -1))}
    assert "100 % copied from the source" in " ".join(page.words)
    assert {"（空）", "written.txt"} <= set(page.words)


def test_scores_of_an_earlier_version_are_named_not_shown(flow: Path, tmp_path: Path):
    write_json(flow / "scores.json", {"schema": SCHEMA, "rouge": {"model": {"rouge-1": 31.25}}, "num_pairs": 5})
    write_lines(flow / "summaries.jsonl", [{"source": "鲸是哺乳动物。", "reference": "鲸", "summary": "鲸用肺呼吸"}])
    write_report([flow], tmp_path / "report.html")
    words = read_page(tmp_path / "report.html").words
    assert any("earlier version" in word and "evaluate again" in word for word in words)
    assert "鲸用肺呼吸" in words


def test_losses_that_were_not_measured_are_not_made_up(flow: Path, tmp_path: Path):
    write_report([flow], tmp_path / "before.html")
    grown = flow.parent / "continue" / "metrics.jsonl"
    with grown.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"kind": "heldout", "step": 500, "loss": 4.5, "accuracy": 0.2}) + "\n")
    write_report([flow], tmp_path / "after.html")
    assert "before growth → at step 1,000" in read_page(tmp_path / "before.html").words
    assert "before growth → right after → at step 1,000" in read_page(tmp_path / "after.html").words


def test_hostile_text_stays_text(flow: Path, tmp_path: Path):
    write_examples(tmp_path / "hostile", documents={"read": 1, "dropped": {HOSTILE: 1}})
    run = write_run(tmp_path / "<i>&amp;", SMALL, range(50), examples_path=tmp_path / "hostile")
    write_report([run, flow], tmp_path / "report.html")
    outline = read_page(tmp_path / "report.html")
    assert "script" not in outline.tags
    assert HOSTILE in outline.words
    assert f"dropped: {HOSTILE}" in outline.words
    assert "<i>&amp;" in outline.words


def test_absent_parts_are_named(tmp_path: Path):
    run = write_run(tmp_path / "bare", SMALL, range(50), start_from="gone/checkpoints/7")
    (run / "metrics.jsonl").unlink()
    write_report([run], tmp_path / "report.html")
    text = " ".join(read_page(tmp_path / "report.html").words)
    for part in ("gone/checkpoints/7", "no training record", "scores.json", "summaries.jsonl", "no manifest at"):
        assert part in text
    assert "no record of a start" in text
    assert "None of these runs began with a grown checkpoint, or grew on its way" in text
    assert "svg" not in read_page(tmp_path / "report.html").tags


def test_line_cut_off_by_a_kill_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    run = write_run(tmp_path / "killed", SMALL, range(50))
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "train", "st')
    write_report([run], tmp_path / "report.html")
    assert "left out: 1" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "metrics.jsonl: 1 unreadable lines are left out" in caplog.text


def test_a_mixture_has_a_line_for_each_source_and_a_seam_where_its_weights_change(tmp_path: Path):
    run = write_run(tmp_path / "mixed", SMALL, range(50))
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))["config"]

    def start(step: int, *mixture: str) -> dict:
        return {"kind": "start", "step": step, "config": {**config, "data": {**config["data"], "mixture": mixture}}}

    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = [
        record | {"loss_by_source": {"news": record["loss"] - 1, "wiki": record["loss"] + 1}} for record in records[1:]
    ]
    before, after = start(0, "a/news=0.7", "a/wiki=0.3"), start(20, "a/news=0.5", "a/wiki=0.3")
    write_lines(
        run / "metrics.jsonl", [records[0] | before, *trained[:2], records[0] | after, records[0] | after, *trained[2:]]
    )
    write_report([run], tmp_path / "report.html")
    words = read_page(tmp_path / "report.html").words
    assert "Loss by source, nats per target token" in words
    assert {"news", "wiki"} <= set(words)
    assert words.count("news 0.7 → 0.5") == 2  # of the loss, and of the loss by source
    assert not any(word.startswith("wiki 0.3 →") for word in words)


def test_held_out_lines_have_colours_that_no_run_has(flow: Path, tmp_path: Path):
    write_report([flow], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    legend = dict(re.findall(r'<li class="c(\d)( dotted)?">', page))
    assert {int(color) for color, dotted in legend.items() if dotted} & {
        int(color) for color, dotted in legend.items() if not dotted
    } == set()
    assert any(legend.values())
    colors = re.findall(r"--c(\d): (#\w+)", (Path(curves.__file__).with_name("style.css")).read_text(encoding="utf-8"))
    assert len({color for _, color in colors}) == len(colors) == 20


def test_folder_that_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(ArtifactError, match=r"config\.json is missing"):
        write_report([tmp_path], tmp_path / "report.html")


def test_values_that_are_not_finite_leave_the_chart_alone():
    drawing = draw_lines("loss", [Line("run", [(0, 1.0), (10, math.nan), (20, math.inf), (30, 2.0)], 0)])
    assert "nan" not in drawing
    assert "inf" not in drawing
    assert draw_lines("loss", [Line("run", [(0, math.nan)], 0)]) == ""


@pytest.mark.parametrize(("low", "high"), [(0, 1), (2.9, 3.1), (-5, 1e6), (0.3, 0.3), (0, 0), (-2, -2), (1e-9, 3e-9)])
def test_ticks_enclose_what_they_measure(low: float, high: float):
    ticks = nice_ticks(low, high, 5)
    assert ticks[0] - 1e-12 * abs(low) <= low <= high <= ticks[-1] + 1e-12 * abs(high)
    assert 2 <= len(ticks) <= 9


def test_report_never_imports_jax():
    code = "import sys, t5pegasus.report; assert not {'jax', 'flax', 'orbax', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_happened_on_the_way_is_told(tmp_path):
    run = write_run(tmp_path / "run", SMALL, range(0, 40))
    norms = {kind: {"encoder.mlp": 1.0, "lm_head": 2.0} for kind in ("gradient", "update", "parameter")}
    bad = {"at_step": 33, "rows": [256, 264], "why": "loss is a spike", "loss": 9.5, "grad_norm": "nan"}
    sample = {"source": "<原文>", "reference": "参考摘要", "summary": "生成的摘要", "scores": {"rouge-1": 41.5}}
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        for record in (
            {"kind": "train", "step": 41, "loss": 2.0, "seconds": 1.0, "tokens_per_second": 9.0, "norms": norms},
            {"kind": "divergence", "step": 33, "action": "skip", **bad},
            {"kind": "divergence", "step": 30, "action": "rollback", **bad, "skipped_rows": [240, 264], "rollback": 1},
            {
                "kind": "bad_examples",
                "step": 35,
                "examples": [{"shard": "a.shard", "index": 7, "reason": "crc"}],
            },
            {"kind": "sample", "step": 40, "samples": [sample]},
        ):
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    attempt = {"attempt": 1, "began": 0.0, "updated": 100.0, "first_step": 0, "last_step": 40, "lost_steps": 3}
    attempt |= {"seconds": {"step": 80.0, "compile": 20.0}, "lost_seconds": 5.0, "down_seconds": 0.0}
    write_lines(run / "goodput.jsonl", [attempt])
    write_report([run], tmp_path / "page.html")
    outline = read_page(tmp_path / "page.html")
    ids = {value for name, value in outline.attributes if name == "id"}
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert {"goodput", "ledger", "norms-by-group", "samples-while-training"} <= ids
    for text in (
        "75.0 % goodput of 1 min 40 s", "updates made again: 3", "loss is a spike", "rows 256 – 263", "back to step 30",
        "rows 240 – 263", "example 7 of a.shard", "&lt;原文&gt;", "ROUGE-1 41.5", "encoder.mlp",
    ):  # fmt: skip
        assert text in page, text


def test_every_group_of_parameters_has_a_line_that_looks_like_no_other(tmp_path):
    run = write_run(tmp_path / "run", SMALL, range(0, 40))
    norms = {kind: {f"group {n}": 1.0 + n for n in range(9)} for kind in ("gradient", "update", "parameter")}
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        for step in (41, 42):
            record = {"kind": "train", "step": step, "loss": 2.0, "seconds": 1.0, "tokens_per_second": 9.0}
            file.write(json.dumps({**record, "norms": norms}) + "\n")
    write_report([run], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    looks = re.findall(r'<li class="([^"]+)"><i></i>group \d</li>', page)
    assert len(looks) == 27
    assert len(set(looks)) == 9
