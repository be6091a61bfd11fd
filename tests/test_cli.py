"""The command line as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image

import cef_compile as cef_compile_
from cef_compile import cli
from cef_compile.cli import common
from cef_compile.cli.measure import DENSE
from cef_compile.cli.models import MODELS

SINGLE = ("FluxTransformer2DModel", "HunyuanVideoTransformer3DModel")
"""Classes with a second kind of layers."""


def cef_compile(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cef_compile.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Terminal output and folder of one small demo."""
    out = tmp_path_factory.mktemp("demo")
    options = "demo --steps 2 --size 64 --frames 8 --device cpu --out"
    result = cef_compile(*options.split(), str(out))
    assert result.returncode == 0, result.stderr
    return result.stdout, out


class TestDemo:
    def test_writes_its_files(self, demo: tuple[str, Path]) -> None:
        _, out = demo
        written = sorted(path.name for path in out.iterdir())
        pictures = ["frames.gif", "frames.png"]
        assert written == [*pictures, "report.html", "report.json", "report.txt"]

    def test_report_names_every_node(self, demo: tuple[str, Path]) -> None:
        report = json.loads((demo[1] / "report.json").read_text())
        paths = [node["path"] for node in report["nodes"]]
        assert sorted(paths) == [f"blocks.{i}.attn{j}" for i in range(6) for j in (1, 2)]
        for node in report["nodes"]:
            assert node["decision"] == ("filtered" if node["path"].endswith("attn1") else "dense")
            assert (node["audit"] is not None) == (node["decision"] == "filtered")
            assert node["kv_len"] == (512 if node["path"].endswith("attn1") else 8)

    def test_report_has_quality_costs_and_versions(self, demo: tuple[str, Path]) -> None:
        report = json.loads((demo[1] / "report.json").read_text())
        assert report["settings"]["tokens"] == 512
        assert 0 < report["mean"]["density"] <= 1
        assert set(report["costs"]) == {"eager", "compiled", "filtered"}
        assert all(cost["step_s"] > 0 for cost in report["costs"].values())
        floor = report["quality"]["floor"]["psnr_db"]
        assert floor is None or floor > 80
        assert report["quality"]["filtered"]["ssim"] > 0.5
        assert report["environment"]["versions"]["torch"] == torch.__version__
        assert report["process_peak_bytes"] > 2**27

    def test_terminal_shows_the_table_and_the_warning(self, demo: tuple[str, Path]) -> None:
        stdout, out = demo
        assert "blocks.5.attn1" in stdout
        assert "compiled dense (the floor)" in stdout
        assert "the times mean nothing" in stdout
        assert stdout.rstrip().endswith(f"look at {out}/report.html")

    def test_audit_knows_steps_and_branches(self, demo: tuple[str, Path]) -> None:
        report = json.loads((demo[1] / "report.json").read_text())
        passes = [(p["step"], p["branch"]) for p in report["passes"]]
        assert passes == [(s, b) for s in ("1", "2") for b in ("text", "no text")]
        for node in report["nodes"]:
            assert node["audit"] is None or node["audit"]["passes"] == [0, 1, 2, 3]

    def test_tile_maps_are_those_of_the_worst_nodes(self, demo: tuple[str, Path]) -> None:
        report = json.loads((demo[1] / "report.json").read_text())
        audited = [node for node in report["nodes"] if node["audit"]]
        audited.sort(key=lambda node: node["audit"]["recall"] - node["audit"]["target"])
        maps = {found["path"]: found for found in report["tile_maps"]}
        assert set(maps) == {node["path"] for node in audited[:3]}
        for found in maps.values():
            assert (found["q_tiles"], found["kv_tiles"]) == (4, 8)
            assert found["panels"][0]["name"] == "mean of all heads"

    def test_pictures_hold_the_frames(self, demo: tuple[str, Path]) -> None:
        with Image.open(demo[1] / "frames.gif") as animation:
            assert animation.n_frames == 8
        with Image.open(demo[1] / "frames.png") as still:
            assert still.width == 3 * 256 + 2 * 4


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("--recall 1.5", "recall must be in (0, 1], got 1.5"),
            ("--size 100", "size must be a multiple of 8 from 8 to 256"),
            ("--frames 40", "frames must be from 1 to 16"),
            ("--clip 2", "clip must be from 0 to 1, got 2"),
            ("--out {file}/out", "cannot write to the folder"),
            ("--steps three", "invalid int value: 'three'"),
            ("--device tpu", "invalid choice: 'tpu'"),
        ],
    )
    def test_mistakes_end_with_one_line_and_code_2(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        options: str,
        message: str,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "file").touch()
        arguments = ["demo", *options.format(file=tmp_path / "file").split()]
        try:
            code = cli.main(arguments)
        except SystemExit as exit_:  # argparse leaves by itself
            code = exit_.code
        assert code == cli.USAGE_ERROR
        captured = capsys.readouterr()
        assert captured.out == ""
        line = captured.err.splitlines()[-1]
        assert line.startswith("cef-compile demo: error: ")
        assert message in line

    def test_no_traceback_in_a_real_process(self, tmp_path: Path) -> None:
        result = cef_compile("demo", "--recall", "0", cwd=tmp_path)
        assert result.returncode == 2
        expected = "cef-compile demo: error: recall must be in (0, 1], got 0.0\n"
        assert result.stderr == expected
        assert list(tmp_path.iterdir()) == []

    def test_missing_packages_name_the_extra(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def without_skimage(name: str) -> object:
            return None if name == "skimage" else find_spec(name)

        monkeypatch.setattr(common, "find_spec", without_skimage)
        assert cli.main(["demo"]) == cli.USAGE_ERROR
        expected = 'needs skimage: pip install "cef-compile[demo]"'
        assert expected in capsys.readouterr().err

    def test_ctrl_c_is_quiet(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(packages: object, extra: str) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(cli.demo, "require", interrupted)
        assert cli.main(["demo"]) == cli.INTERRUPTED

    def test_a_command_is_needed(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as exit_:
            cli.main([])
        assert exit_.value.code == 2
        assert "demo" in capsys.readouterr().err


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a user's mistake ends with."""
    assert cli.main(arguments) == cli.USAGE_ERROR
    captured = capsys.readouterr()
    assert captured.out == ""
    start = f"cef-compile {arguments[0]}: error: "
    assert captured.err.startswith(start)
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix(start).rstrip()


class TestReport:
    def test_the_demo_s_folder(
        self, demo: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        page = tmp_path / "page.html"
        assert cli.main(["report", str(demo[1]), "--out", str(page)]) == 0
        assert capsys.readouterr().out == f"written to {page}\n"
        assert page.read_bytes() == (demo[1] / "report.html").read_bytes()

    def test_beside_the_file(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        report = cef_compile_.Report("p", [])
        (tmp_path / "mine.json").write_text(json.dumps(report.to_dict()))
        assert cli.main(["report", str(tmp_path / "mine.json")]) == 0
        assert "No attention node" in (tmp_path / "mine.html").read_text()

    def test_mistakes(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = str(tmp_path)
        assert fails(["report", folder], capsys).endswith("report.json: No such file or directory")
        (tmp_path / "report.json").write_text("{}")
        assert fails(["report", folder], capsys).endswith(
            "the file has no 'nodes'; is this a report of cef_compile?"
        )


class TestExplain:
    @pytest.fixture(autouse=True)
    def _fresh(self, fresh_dynamo: None) -> None: ...

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """A small Wan, configured as a pipeline's transformer."""
        config = {
            "_class_name": "WanTransformer3DModel",
            "_diffusers_version": "0.35.0",
            "num_attention_heads": 2,
            "attention_head_dim": 64,
            "num_layers": 2,
            "ffn_dim": 64,
            "text_dim": 32,
        }
        (tmp_path / "transformer").mkdir()
        (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
        return tmp_path

    def test_a_folder(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for name in (folder, folder / "transformer"):
            assert cli.main(["explain", str(name), "--recall", "0.8"]) == 0
            out = capsys.readouterr().out
            assert out.splitlines()[0] == (
                "WanTransformer3DModel, 81 frames of 720 x 1280 pixels, 512 text tokens, bfloat16"
            )
            assert "4 attention nodes: 2 filtered, 2 dense. Policy: Balanced(recall=0.8)" in out
            assert "75600 x 75600" in out

    def test_size_and_json(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        sizes = "--height 480 --width 832 --frames 9 --text 77"
        assert cli.main(["explain", str(folder), "--json", *sizes.split()]) == 0
        nodes = json.loads(capsys.readouterr().out)["nodes"]
        assert [(node["q_len"], node["kv_len"]) for node in nodes[:2]] == [(4680, 4680), (4680, 77)]

    def test_a_policy_file(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        rules = cef_compile_.Rules({"blocks.1.attn1": 0.7})
        cef_compile_.save_policy(rules, folder / "policy.json")
        policy = str(folder / "policy.json")
        assert cli.main(["explain", str(folder), "--json", "--policy", policy]) == 0
        nodes = json.loads(capsys.readouterr().out)["nodes"]
        recalls = {node["path"]: node["recall"] for node in nodes}
        assert recalls["blocks.1.attn1"] == 0.7
        assert recalls["blocks.0.attn1"] is None
        (folder / "policy.json").write_text("{")
        assert policy in fails(["explain", str(folder), "--policy", policy], capsys)
        missing = fails(["explain", str(folder), "--policy", str(folder / "no.json")], capsys)
        assert missing.endswith("no.json: No such file or directory")

    @pytest.mark.parametrize("name", MODELS)
    def test_every_known_class(self, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        """Each at a size of its own, with its first layers only, which is what takes the time."""
        model = MODELS[name]
        layers = {"num_layers": 1, **({"num_single_layers": 1} if name in SINGLE else {})}
        with torch.device("meta"):
            built = getattr(diffusers, name)(**layers).to(torch.bfloat16).eval()
        inputs = model.inputs(built.config, model.size)
        report = cef_compile_.explain(built, return_dict=False, **inputs)
        largest = max(report.nodes, key=lambda node: node.kv_len)
        assert largest.decision == "filtered"
        assert largest.kv_len >= 4096

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("WanTransformer", "no class 'WanTransformer'; did you mean WanTransformer3DModel?"),
            ("Zzz", "diffusers has no class 'Zzz'; known are CogVideoX"),
            ("AutoencoderKL", "there is no example call of AutoencoderKL; there is one of"),
            ("/no/such", "/no/such is no folder; give a class"),
            ("{tmp}", "/config.json nor"),
            ("WanTransformer3DModel --recall 2", "recall must be in (0, 1], got 2.0"),
            (
                "SD3Transformer2DModel --height 8192",
                "cannot explain SD3Transformer2DModel at 1 x 8192 x 1024: Height (512)",
            ),
            ("WanTransformer3DModel --frames 0", "frames must be at least 1, got 0"),
        ],
    )
    def test_mistakes(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str
    ) -> None:
        given = arguments.format(tmp=tmp_path).split()
        assert message in fails(["explain", *given], capsys)

    def test_damaged_configurations(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = folder / "transformer" / "config.json"
        config = json.loads(path.read_text())
        for content, message in (
            ("{", f"cannot read {path}: Expecting"),
            ("{}", f"{path} has no _class_name"),
            (json.dumps({**config, "num_layers": "two"}), "cannot build WanTransformer3DModel: "),
        ):
            path.write_text(content)
            assert message in fails(["explain", str(folder)], capsys)


class TestBench:
    def test_a_cpu_is_refused(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert "times on a CPU mean nothing" in fails(["bench"], capsys)
        assert "finds no CUDA device" in fails(["bench", "--device", "cuda"], capsys)

    def test_table(self, capsys: pytest.CaptureFixture[str]) -> None:
        options = "bench --device cpu --force --shape 1x2x512x16 --density 0.25 1"
        assert cli.main(options.split()) == 0
        out = capsys.readouterr().out
        assert "1x2x512x16  cef_compile         0.250" in out
        assert "these times mean nothing" in out

    def test_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        options = "bench --device cpu --force --shape 1x2x512x16 --density 1 --json"
        assert cli.main(options.split()) == 0
        rows = json.loads(capsys.readouterr().out)["rows"]
        assert [row["attention"] for row in rows] == [*DENSE, "cef_compile"]
        dense = [row["ms"] for row in rows[:-1] if row["ms"] is not None]
        assert dense
        last = rows[-1]
        assert last["density"] == last["recall"] == pytest.approx(1)
        assert last["speed"] == pytest.approx(min(dense) / last["ms"])
        unavailable = [row for row in rows if row["ms"] is None]
        assert all(row["note"] == "not available" for row in unavailable)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("--shape 24x128", "shape must be BATCHxHEADSxLENGTHxHEAD_DIM, such as"),
            ("--shape 1x0x4x8", "got '1x0x4x8'"),
            ("--density 1.5", "density must be in (0, 1], got 1.5"),
            ("--shape 1x1x64x70000", "the head_dim is not supported"),
        ],
    )
    def test_mistakes(self, capsys: pytest.CaptureFixture[str], options: str, message: str) -> None:
        assert message in fails(["bench", "--device", "cpu", "--force", *options.split()], capsys)


class TestEnv:
    def test_lines(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["env"]) == 0
        lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
        assert lines["torch"] == torch.__version__
        assert "gpu" in lines

    def test_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["env", "--json"]) == 0
        env = json.loads(capsys.readouterr().out)
        assert env["versions"]["torch"] == torch.__version__
        assert len(env["cuda"]["devices"]) == torch.cuda.device_count()


@pytest.mark.parametrize("command", ["demo", "explain", "bench", "report", "env"])
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert f"examples:\n  cef-compile {command}" in out


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from cef_compile.cli import main\n"
        "try: main(['demo', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'triton', 'diffusers', 'skimage', 'PIL'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "default: 128 on cpu, 256 on cuda" in " ".join(result.stdout.split())
