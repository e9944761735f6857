"""The command as a user runs it, without a GPU: one report, two side by side, and bad input in one line."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from flexrattn.inspect import command
from flexrattn.inspect.page import page as page_of
from flexrattn.inspect.report import Kernel, from_json, to_json
from flexrattn.inspect.text import to_text

SECTIONS = ("roofline", "layer-0", "layer-3", "memory", "health", "gpu")
QUICK = ("--processes", "1", "--device", "cpu")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of a report of configs/debug.yaml for sm_80, packed rows, with everything embedded."""
    out = tmp_path_factory.mktemp("report")
    flags = ("--arch", "sm_80", "--dtype", "bf16", "--documents", "300,212", "--sass", "--out", str(out))
    embed = ("--embed", "python", "ttir", "ttgir", "ptx", "sass")
    assert command.main(["configs/debug.yaml", *QUICK, *flags, *embed]) == 0
    return out


@pytest.fixture(scope="module")
def report(written):
    return json.loads((written / "report.json").read_text())


class Page(HTMLParser):
    """Ids, tags left open, tags, and everything that would be fetched."""

    VOID = frozenset({"meta", "br", "img", "hr", "link", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.open: list[str] = []
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append(tag)
        if "id" in found:
            self.ids.append(found["id"])
        self.fetched += [found[name] for name in ("src", "data", "poster") if name in found]
        if tag in ("link", "script", "iframe", "object", "embed"):
            self.fetched.append(tag)
        if tag == "a" and not found["href"].startswith(("#", "kernels/")):
            self.fetched.append(found["href"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open
        assert self.open.pop() == tag


def test_the_page_is_whole_and_fetches_nothing(written):
    text = (written / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.fetched == []
    assert "@import" not in text
    assert "url(" not in text
    assert set(SECTIONS) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert re.findall(r'href="#([\w-]+)"', text) == [name for name in SECTIONS if name in page.ids]
    assert page.tags.count("details") > 20
    assert text.count('class="mask"') == 2
    assert 'id="roofline-plot"' in text
    assert "@media print" in text


def test_every_text_is_in_the_page_and_in_a_file(written, report):
    page = (written / "report.html").read_text()
    scan = [k for layer in report["layers"] for k in layer["kernels"] if k["group"] == "linear branch"]
    assert scan
    for kernel in scan:
        assert set(kernel["files"]) == {"python", "ttir", "ttgir", "ptx", "sass"}
        texts = {stage: (written / path).read_text() for stage, path in kernel["files"].items()}
        assert "def " in texts["python"]
        assert "tt.func" in texts["ttir"]
        assert "#blocked" in texts["ttgir"]
        assert ".target sm_80" in texts["ptx"]
        assert "EXIT" in texts["sass"]
    for told in ("mma.sync.aligned", "tt.func public @chunk_dkv_kernel", "EXIT", "def chunk_dq_kernel"):
        assert told in page


def test_no_file_tells_of_this_machine(written):
    root = str(Path(command.__file__).parents[2])
    for path in written.rglob("*"):
        if path.is_file():
            assert root not in path.read_text(), path
            assert "site-packages/" not in path.read_text(), path


def test_numbers_of_the_report(report):
    assert report["problem"] == {
        "batch": 8,
        "seq_len": 512,
        "dtype": "bf16",
        "documents": [300, 212],
        "arch": "sm_80",
    }
    local, other = report["layers"]
    assert (local["name"], local["count"], other["name"], other["count"]) == ("local", 3, "global", 1)
    # A window of 64 within documents of 300 and 212 tokens, and causal within them, counted pair by pair.
    for layer, window in ((local, 64), (other, 10**6)):
        pairs = sum(min(t, window) + 1 for length in (300, 212) for t in range(length))
        assert layer["mask"]["kept_pairs"] == pairs
        forward, backward = (k for k in layer["kernels"] if k["group"] == "softmax branch")
        assert forward["flops"] == 4 * 32 * 4 * 8 * pairs
        assert backward["flops"] == 2.5 * forward["flops"]
    for layer in report["layers"]:
        for kernel in layer["kernels"]:
            assert kernel["roofline_s"] > 0 or kernel["flops"] == 0
            assert kernel["measured_s"] is None
    scan = [k for k in local["kernels"] if k["group"] == "linear branch"]
    assert {"chunk_state_fwd", "chunk_output_fwd", "chunk_dq", "chunk_state_bwd", "chunk_dkv"} <= {
        k["name"] for k in scan
    }
    for kernel in scan:
        assert kernel["registers"] >= (8 if kernel["name"] == "empty_rows" else 16)
        assert 1 <= kernel["programs_per_sm"] <= 32
        assert kernel["waves"] > 0
    assert report["health"] is None
    assert report["memory"]["traced"] == sum(x["count"] * x["memory"]["traced"] for x in report["layers"])


def test_the_terminal_shows_the_report(capsys):
    assert command.main(["configs/debug.yaml", *QUICK, "--recipe_args.scan_impl", "torch", "--seq-len", "256"]) == 0
    text = capsys.readouterr().out
    for told in (
        "mask sliding_window_64",
        "forward, softmax branch",
        "backward, all",
        "kept to the backward",
        'No kernels of the linear branch: scan_impl "torch" uses torch operations.',
        "Graph health: not looked at (it takes a GPU, and bf16 or fp32).",
        "Look at",
        '  - local: no kernels of the linear branch, scan_impl "torch" uses torch operations',
    ):
        assert told in text, told
    assert max(map(len, text.splitlines())) <= 160


def test_json_is_read_again(report):
    again = from_json(report, "report.json")
    assert all(isinstance(kernel, Kernel) for layer in again["layers"] for kernel in layer["kernels"])
    assert to_json(again) == report


def test_compare_two_versions(written, tmp_path, capsys, report):
    other = json.loads(json.dumps(report))
    changed = next(k for k in other["layers"][0]["kernels"] if k["name"] == "chunk_dq")
    before = changed["registers"]
    changed["registers"] = before + 7
    other["layers"][0]["memory"]["traced"] *= 2
    (tmp_path / "b.json").write_text(json.dumps(other))
    arguments = ["--compare", str(written / "report.json"), str(tmp_path / "b.json"), "--out", str(tmp_path / "both")]
    assert command.main(arguments) == 0
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if line.startswith("backward: chunk_dq "))
    assert f" {before} " in line
    assert f" {before + 7} " in line
    kept = next(line for line in text.splitlines() if line.startswith("local, traced"))
    assert kept.endswith("2.00")
    html = (tmp_path / "both" / "compare.html").read_text()
    page = Page(html)
    assert page.open == page.fetched == []
    assert html.count('class="mask"') == 4
    assert len(json.loads((tmp_path / "both" / "compare.json").read_text())) == 2


def test_compare_a_configuration_with_a_report(written, capsys):
    flags = ("--recipe_args.scan_impl", "torch", "--layer", "global")
    assert command.main(["--compare", "configs/debug.yaml", str(written / "report.json"), *QUICK, *flags]) == 0
    text = capsys.readouterr().out
    assert "local layer" in text  # B has one, A does not
    assert "global layer: time" in text


MISTAKES = {
    "architecture": (["configs/debug.yaml", "--arch", "sm_70"], "unknown architecture 'sm_70', did you mean"),
    "unknown-gpu": (["configs/debug.yaml", "--gpu", "h300"], "unknown GPU 'h300', did you mean 'h200'?"),
    "another-architectures-gpu": (["configs/debug.yaml", "--gpu", "a100", "--arch", "sm_90"], "use --arch sm_80"),
    "dtype": (["configs/debug.yaml", "--dtype", "bf61"], "unknown dtype 'bf61', did you mean 'bf16'?"),
    "layer": (["configs/debug.yaml", "--layer", "lokal"], "did you mean 'local'?"),
    "layer-index": (["configs/debug.yaml", "--layer", "9"], "--layer 9: the model has layers 0 to 3"),
    "seq-len": (["configs/debug.yaml", "--seq-len", "0"], "--seq-len must be positive, got 0"),
    "too-long": (["configs/debug.yaml", "--seq-len", "1000000"], "more than the model's max_seq_len 131072"),
    "documents": (
        ["configs/debug.yaml", "--documents", "3,4"],
        "must be lengths >= 1 that add up to the sequence, 512 tokens",
    ),
    "documents-text": (["configs/debug.yaml", "--documents", "a"], "--documents takes lengths such as"),
    "no-such-file": (["configs/debgu.yaml"], "does not exist, did you mean 'configs/debug.yaml'?"),
    "config-that-does-not-build": (
        ["configs/debug.yaml", "--recipe_args.layer_kind", "swa", "--recipe_args.window", "null"],
        "'swa' needs a window",
    ),
    "kernels-that-do-not-take-it": (
        ["configs/debug.yaml", "--recipe_args.scan_impl", "triton", "--recipe_args.model.head_dim", "48"],
        'scan_impl "triton": the kernels take head sizes',
    ),
    "config-flag": (["configs/debug.yaml", "--recipe_args.windw", "3"], "did you mean 'window'?"),
    "flag": (["configs/debug.yaml", "--seqlen", "3"], "unknown flag --seqlen, did you mean '--seq-len'?"),
    "two-configs": (["configs/debug.yaml", "configs/full_3b.yaml"], "use --compare A B for two"),
    "none": ([], "give one configuration, or two with --compare"),
    "config-and-compare": (["configs/debug.yaml", "--compare", "a.json", "b.json"], "give one configuration, or two"),
    "no-such-report": (["--compare", "a.json", "b.json"], "a.json does not exist"),
    "no-device": (["configs/debug.yaml", "--device", "cuda"], "--device cuda needs a GPU"),
    "processes": (["configs/debug.yaml", "--processes", "0"], "--processes must be positive, got 0"),
}


@pytest.mark.parametrize(("arguments", "said"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line(arguments, said, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if "error" in line]
    assert line.startswith("flexrattn.inspect: error: ")
    assert said in line
    assert "Traceback" not in err


def breaking():
    """A mask that no graph goes through."""

    def keep(b, h, q_idx, kv_idx):
        torch._dynamo.graph_break()  # here
        return kv_idx <= q_idx

    return keep


def test_a_layer_with_a_graph_break_is_one_line_with_its_place(capsys):
    mask = ("--recipe_args.global_mask", "tests.flexrattn.inspect.test_command:breaking", "--layer", "global")
    with pytest.raises(SystemExit) as stop:
        command.main(["configs/debug.yaml", *QUICK, *mask])
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    with open(__file__) as file:
        number = next(i for i, text in enumerate(file, 1) if text.rstrip().endswith("graph_break()  # here"))
    assert "cannot be compiled as one graph" in line
    assert f"(at tests/flexrattn/inspect/test_command.py:{number})" in line


def test_reports_of_another_schema_are_refused(tmp_path, capsys, report):
    for name, content in (("a", {**report, "schema": 0}), ("b", [1]), ("c", None)):
        path = tmp_path / f"{name}.json"
        path.write_text("{" if content is None else json.dumps(content))
        with pytest.raises(SystemExit):
            command.main(["--compare", str(path), str(path)])
        assert re.search(r"no report of this version|is no JSON", capsys.readouterr().err)


def test_interrupted_is_one_line(monkeypatch, capsys):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "make_report", interrupt)
    assert command.main(["configs/debug.yaml", *QUICK]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("lacks", ["gpu", "memory"])
def test_a_report_that_lacks_something_is_refused(report, lacks):
    plain = json.loads(json.dumps(report))
    where = plain if lacks == "gpu" else plain["layers"][-1]
    del where[lacks]
    with pytest.raises(ValueError, match=f"x.json is no whole report, it lacks {lacks}: make it again"):
        from_json(plain, "x.json")


def test_an_out_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(SystemExit):
        command.main(["configs/debug.yaml", "--out", str(tmp_path / "out")])
    assert "is a file: name a folder" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"
    with pytest.raises(SystemExit):
        command.main(["configs/debug.yaml", "--out", str(tmp_path / "out" / "below")])
    said = capsys.readouterr().err
    assert "out/below" in said
    assert said.count("\n") == 1


def browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    return next((found for name in names if (found := shutil.which(name))), None)


@pytest.mark.skipif(browser() is None, reason="no Chromium or Chrome on the PATH")
def test_a_browser_renders_the_page(written, tmp_path):
    """Its document holds every section, and what it draws of a window is not blank; printing gives pages."""
    program = browser()
    assert program is not None
    page = (written / "report.html").as_uri()

    def run(*arguments: str) -> str:
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        done = subprocess.run([*command, *arguments, page], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    document = run("--dump-dom")
    for section in SECTIONS:
        assert f'id="{section}"' in document
    assert document.count("<details>") > 20
    picture, printed = tmp_path / "page.png", tmp_path / "page.pdf"
    run("--window-size=1200,1600", f"--screenshot={picture}")
    run(f"--print-to-pdf={printed}")
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size > 30_000  # a blank page of that size takes 6 KB
    assert printed.read_bytes()[:5] == b"%PDF-"
    assert printed.read_bytes().count(b"/Type /Page\n") >= 2


def test_what_a_gpu_adds_is_shown(report):
    """A report with measured numbers, made up here, as text and as a page."""
    made = from_json(json.loads(json.dumps(report)), "report.json")
    local = made["layers"][0]
    for kernel in local["kernels"]:
        kernel.measured_s = 2 * (kernel.roofline_s or 1e-6)
        kernel.share = 0.5
    flex = next(kernel for kernel in local["kernels"] if kernel.group == "softmax branch")
    flex.options, flex.warps, flex.stages = {"BLOCK_M": 128, "BLOCK_N": 64, "USE_TMA": False}, 8, 3
    event = {"where": "flexrattn/model.py:52", "why": "size <changed>"}
    local["flex"] = {"dynamic": True, "compiles": 2, "recompiles": [event], "graph_breaks": []}
    made["health"] = {
        "what": "a training step",
        "graphs": 3,
        "graph_breaks": [],
        "host_syncs": [{"where": "mine.py:7", "why": "called a synchronizing CUDA operation"}],
        "recompiles": [event],
        "warm_up_recompiles": [],
    }
    shown = to_text(made)
    assert "forward: BLOCK_M 128, BLOCK_N 64, 8 warps, 3 stages" in shown
    assert "dynamic: slower by 26-38 %" in shown
    assert "recompiled at flexrattn/model.py:52: size <changed>" in shown
    assert "0 graph breaks, 1 host syncs, 1 recompilations" in shown
    assert "host sync at mine.py:7: called a synchronizing" in shown
    assert "measured ms" in shown
    page = page_of(made, embed=[])
    assert Page(page).open == []
    assert "size &lt;changed&gt;" in page
    assert "<code>mine.py:7</code>" in page
    assert "filled: measured" in page
    assert "50%" in page
    assert 'class="bar roof"' in page
