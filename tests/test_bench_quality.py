"""The quality study: its token order is sound, and a small run of it says what it should."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import models
import torch
from hypothesis import given
from hypothesis import strategies as st

from cef_compile.kernels import config as c
from cef_compile.kernels import reference

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))

from token_order import cubes, hilbert, morton, reordered  # noqa: E402
from variants import BASE, plan  # noqa: E402

sizes = st.integers(1, 13)


@given(grid=st.tuples(sizes, sizes, sizes), block=st.tuples(sizes, sizes, sizes))
def test_an_order_by_cubes_takes_every_token_once_and_cubes_whole(grid, block) -> None:
    order = cubes(grid, block)
    places = torch.cartesian_prod(*(torch.arange(size) for size in grid)).reshape(-1, 3)
    assert torch.equal(order.sort().values, torch.arange(len(places)))
    cube = places[order] // torch.tensor(block)
    changes = (cube[1:] != cube[:-1]).any(-1).sum().item()
    assert changes + 1 == len(cube.unique(dim=0))


@given(grid=st.tuples(sizes, sizes, sizes), curve=st.sampled_from([hilbert, morton]))
def test_a_curve_takes_every_token_once(grid, curve) -> None:
    order = curve(grid)
    assert torch.equal(order.sort().values, torch.arange(len(order)))


def test_a_hilbert_curve_makes_steps_of_one() -> None:
    for edge in (2, 4, 8):
        places = torch.cartesian_prod(*[torch.arange(edge)] * 3)[hilbert((edge, edge, edge))]
        assert torch.all((places[1:] - places[:-1]).abs().sum(-1) == 1)


def test_a_morton_curve_takes_one_eighth_after_the_other() -> None:
    places = torch.cartesian_prod(*[torch.arange(8)] * 3)[morton((8, 8, 8))]
    for eighth in places.split(64):
        assert len((eighth // 4).unique(dim=0)) == 1


@torch.no_grad()
def test_a_model_on_reordered_tokens_computes_the_same() -> None:
    model, inputs = models.wan()
    plain = model(**inputs)[0]
    with reordered(model, cubes((4, 16, 16), (4, 4, 4))):
        other = model(**inputs)[0]
    torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(**inputs)[0], plain)


def test_a_small_study_is_written_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    out = tmp_path / "quality.json"
    small = ["--frames", "4", "--size", "64", "--steps", "1", "--seeds", "1", "--clips", "0"]
    command = [sys.executable, str(BENCH / "quality.py"), *small, "--out", str(out)]
    for recalls in (["1.0"], ["1.0", "0.5"]):
        chosen = ["--methods", "planned, each node", "--parameters", *recalls]
        run = subprocess.run([*command, *chosen], capture_output=True, text=True, check=True)
    assert len(run.stdout.splitlines()) == 1  # only the row that was missing
    floor, full, half = json.loads(out.read_text())["rows"]
    assert floor["method"] == "dense, another kernel"
    assert (full["recall"], full["density"]) == (1.0, 1.0)
    # Nothing is dropped, so that only rounding is left, as in the floor.
    assert min(full["noise_psnr"], floor["noise_psnr"]) > 80
    assert half["density"] < 1
    assert half["noise_psnr"] < full["noise_psnr"]
    other = subprocess.run(
        [*command, "--raster", *chosen], capture_output=True, text=True, check=False
    )
    assert other.returncode == 2
    assert "another setting" in other.stderr


def tiny_lab(out: Path, *given: str) -> list[dict]:
    small = ["--frames", "4", "--size", "64", "--steps", "1", "--seeds", "1", "--clips", "0"]
    command = [sys.executable, str(BENCH / "variants.py"), *small, *given, "--out", str(out)]
    subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(out.read_text())["rows"]


def test_variants_that_drop_nothing_are_dense_and_others_are_not(tmp_path: Path) -> None:
    chosen = ["--only", "own threshold of each node", "compensated, gate .8"]
    full, again, *_ = tiny_lab(tmp_path / "lab.json", *chosen, "--recalls", "1.0")
    assert min(full["noise_psnr"], again["noise_psnr"]) > 80
    assert (full["density"], again["density"]) == (1.0, 1.0)
    rows = tiny_lab(tmp_path / "lab.json", *chosen[:2], "--recalls", "1.0", "0.5")
    (half,) = (row for row in rows if row["target"] == 0.5)
    assert half["density"] < 1
    assert 0.5 <= half["recall"] < 1  # four key tiles: the best alone may have more
    assert half["noise_psnr"] < full["noise_psnr"]


@given(seed=st.integers(0, 2**32 - 1), heads=st.integers(1, 3))
def test_the_lab_ranks_as_the_library_does(seed: int, heads: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 1, heads, 4 * c.BLOCK_M, 16, generator=draw)
    rank, energy, _ = plan(q, k, v, 0.25, BASE)
    planned = reference.plan(q, reference.centroids(k), 0.25)
    torch.testing.assert_close(energy, planned.energy)
    bins = c.rank_bin(rank).int()
    best = bins == bins.amax(-1, keepdim=True)
    # Rounding may carry a rank over the edge of its bin; the library moves the best one up.
    assert ((bins - planned.bins.int()).abs() <= 1)[~best].all()


def test_a_small_study_of_orders(tmp_path: Path) -> None:
    out = tmp_path / "order.json"
    small = ["--grids", "4x8x8", "--levels", "1", "--clips", "1"]
    command = [sys.executable, str(BENCH / "order_study.py"), *small, "--out", str(out)]
    subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(out.read_text())
    assert (
        len(found["rows"]) == len(found["summary"]) == 2 * len({r["order"] for r in found["rows"]})
    )
    for row in found["summary"]:
        assert 0 < min(row["exact"], row["planned"]) < 1
        assert row["order"] != "raster" or row["of_raster"] == 1
