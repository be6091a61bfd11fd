"""The command line as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image

from cef_compile import cli


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
        assert written == ["frames.gif", "frames.png", "report.json", "report.txt"]

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
        assert stdout.rstrip().endswith(f"written to {out}/")

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

        monkeypatch.setattr(cli, "find_spec", without_skimage)
        assert cli.main(["demo"]) == cli.USAGE_ERROR
        expected = 'needs skimage: pip install "cef-compile[demo]"'
        assert expected in capsys.readouterr().err

    def test_ctrl_c_is_quiet(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(packages: object, extra: str) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(cli, "_require", interrupted)
        assert cli.main(["demo"]) == cli.INTERRUPTED

    def test_a_command_is_needed(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as exit_:
            cli.main([])
        assert exit_.value.code == 2
        assert "demo" in capsys.readouterr().err


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
