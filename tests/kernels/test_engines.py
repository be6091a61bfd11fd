"""Engines of the attention over lists: the choice, Hopper's code, and each against float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DEVICE,
    FEWER,
    ON_GPU,
    assert_nan_row_keeps_to_itself,
    assert_output,
    assert_plan,
    assert_replays,
    assert_same_bits,
    laid_out,
    listed,
    on_cpu,
    on_device,
)
from order_cases import layout_cases, permuted
from support import Case, Inputs, cases, control, same_bits, visible_tiles

from cef_compile.kernels import config as c
from cef_compile.kernels import hopper_plan, launch
from cef_compile.kernels.centroids import centroids
from cef_compile.kernels.engines import LIST_ENGINES, Call, find_engine, lacks
from cef_compile.kernels.order import Layout
from cef_compile.kernels.ranks import Plan, variance_factor

FITS = Call(90, torch.bfloat16, 128, 128)
CALLS = st.builds(
    Call,
    architecture=st.sampled_from([0, 80, 89, 90, 100, 120]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    dim=st.sampled_from([36, 40, 64, 96, 128, 136]),
    value_dim=st.sampled_from([24, 64, 100, 128, 256]),
    described=st.booleans(),
    masked=st.booleans(),
    ordered=st.booleans(),
    compensate=st.booleans(),
    online=st.booleans(),
    bound=st.booleans(),
    certified=st.booleans(),
    scores=st.sampled_from(c.SCORES),
    q_len=st.sampled_from([256, 24_575, 24_576, 75_600]),
    kv_len=st.sampled_from([256, 24_575, 24_576, 75_600]),
)


SERVED = {24, 40, 64, 96, 128}


class TestChoice:
    @given(CALLS)
    def test_hopper_where_it_fits_and_triton_elsewhere(self, call: Call) -> None:
        dims = (call.dim, call.value_dim)
        fits = (
            call.architecture == 90
            and call.dtype != torch.float32
            and set(dims) <= SERVED
            and (call.dim in (64, 128) or not call.online)
            and call.described
            and not call.compensate
        )
        eight = call.scores == "int8" and call.dim == 128 and not call.online
        long = min(call.q_len, call.kv_len) >= 24_576
        hopper = "hopper-int8" if eight and long else "hopper"
        worth = fits and (call.certified or not call.bound)
        assert find_engine(call) == (hopper if worth else "triton")
        assert find_engine(call, "triton") == "triton"
        if fits:
            assert find_engine(call, "hopper") == "hopper"
        else:
            with pytest.raises(ValueError, match="engine 'hopper' cannot compute this call: "):
                find_engine(call, "hopper")
        assert bool(lacks("hopper-int8", call)) == (not (fits and eight))
        if fits and eight:  # of any length, where it is asked for
            assert find_engine(call, "hopper-int8") == "hopper-int8"

    def test_wanted_engine_must_exist(self) -> None:
        with pytest.raises(ValueError, match="not 'cudnn'"):
            find_engine(FITS, "cudnn")
        with pytest.raises(ValueError, match="not 'fa4'"):
            find_engine(replace(FITS, online=True), "fa4")

    @pytest.mark.parametrize(
        ("change", "why"),
        [
            ({"architecture": 80}, "older than Hopper"),
            ({"dtype": torch.float32}, "dtype"),
            ({"dim": 40}, "head_dim 40 and 128"),
            ({"dim": 96, "value_dim": 96}, "head_dim 96 and 96"),
            ({"masked": True}, "key mask"),
            ({"ordered": True}, "token order"),
            ({"compensate": True}, "compensate"),
        ],
    )
    def test_what_flash_attention_4_lacks(self, change: dict[str, object], why: str) -> None:
        assert why in lacks("fa4", replace(FITS, **change))

    @pytest.mark.parametrize(
        ("change", "why"),
        [
            ({"scores": "exact"}, "scores='exact'"),
            ({"online": True}, "online"),
            ({"dim": 64}, "head_dim 64, not 128"),
            ({"architecture": 100}, "not a Hopper"),
            ({"compensate": True}, "compensate"),
        ],
    )
    def test_what_scores_in_8_bits_need(self, change: dict[str, object], why: str) -> None:
        assert why in lacks("hopper-int8", replace(FITS, **{"scores": "int8", **change}))

    def test_every_engine_is_on_record(self) -> None:
        assert set(LIST_ENGINES) <= set(c.ENGINES)


COMPILE = Path(__file__).with_name("compile_hopper.py")
SHARED_MEMORY = 227 * 1024
"""Bytes that a program can have on Hopper."""
MULTIPROCESSOR_MEMORY = 228 * 1024
PROGRAM_MEMORY = 1024
"""What the system takes of each program's."""


@pytest.mark.parametrize(
    ("head_dim", "value_dim", "other", "channels", "pieces"),
    [
        (128, 128, False, 128, 1),
        (64, 64, True, 64, 1),
        (96, 96, False, 96, 2),
        (112, 112, False, 128, 1),
        (72, 40, True, 80, 2),
    ],
)
def test_code_for_hopper(
    head_dim: int, value_dim: int, other: bool, channels: int, pieces: int
) -> None:
    """The Gluon kernel compiles without a GPU, fits the chip, and overlaps what it should.

    Its scores are over so many channels, and its output comes in so many products.
    """
    code = compiled("attend", head_dim, value_dim, other)
    assert code["shared"] <= SHARED_MEMORY
    # Scores and values, of 16 channels or keys each: first step, loop and last product; two groups.
    assert code["products"] == 2 * 2 * (channels // 16 + pieces * 2 * c.BLOCK_N // 16)
    assert code["copies"] == 2 * (c.tiles(head_dim, 64) + c.tiles(value_dim, 64))
    # A thread has 64 weights of a step, and two rows that shrink.
    assert code["beside"] == [66, 66]
    assert code["spills_in_steps"] == 0
    # With 128 channels of both a few addresses are, once for each query tile.
    assert code["spills"] == 0 or channels == 128


@pytest.mark.parametrize(("value_dim", "other"), [(128, False), (64, True)])
def test_code_of_scores_in_8_bits(value_dim: int, other: bool) -> None:
    """As above; an instruction takes 32 channels of a score, and a copy all of a tile of keys."""
    code = compiled("int8", value_dim, other)
    assert code["shared"] <= SHARED_MEMORY
    assert code["products"] == 2 * 2 * (128 // 32 + 2 * c.BLOCK_N // 16)
    assert code["copies"] == 2 * (1 + c.tiles(value_dim, 64))
    assert code["beside"] == [66, 66]
    assert code["spills_in_steps"] == 0
    assert code["spills"] == 0 or value_dim == 128  # as above


@pytest.mark.parametrize(
    ("dim", "bound", "certified", "other"),
    [(128, True, False, False), (128, False, True, False), (128, True, True, True),
     (64, False, True, True)],
)  # fmt: skip
def test_code_of_the_online_filter(dim: int, bound: bool, certified: bool, other: bool) -> None:
    """Four programs fit a multiprocessor, and nothing is multiplied twice."""
    code = compiled("judge", dim, bound, certified, other)
    assert 4 * (code["shared"] + PROGRAM_MEMORY) <= MULTIPROCESSOR_MEMORY
    # Scores by 16 channels, of 64 rows each.
    assert code["products"] == dim // 16
    assert code["waits"] == 1
    # With all there is some addresses are, once for each query tile.
    assert code["spills"] == 0 or (bound and certified and other)


@pytest.mark.parametrize(
    ("dim", "key_tiles", "other", "programs"),
    [(128, 256, False, 3), (128, 512, True, 2), (64, 512, False, 2), (128, 1182, True, 1),
     (128, 2048, True, 1)],
)  # fmt: skip
def test_code_of_the_plan(dim: int, key_tiles: int, other: bool, programs: int) -> None:
    """So many programs fit a multiprocessor, and each product is there once for each pass."""
    code = compiled("plan", dim, key_tiles, other)
    assert code["shared"] <= hopper_plan.shared_bytes(dim, key_tiles)
    assert programs * (code["shared"] + PROGRAM_MEMORY) <= MULTIPROCESSOR_MEMORY
    # Means and variances, of 16 channels each; beyond 1,280 key tiles in a second pass too.
    assert code["products"] == 2 * dim // 16 * (1 + (key_tiles > 1280))
    assert code["spills"] == 0


def compiled(*arguments: object) -> dict[str, Any]:
    """What came out for a kernel, by a process without Triton's interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(COMPILE), *map(str, arguments)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def _engines() -> list[str]:
    """Engines that compute 16-bit calls of this GPU with head_dim 128."""
    if not ON_GPU:
        return []
    major, minor = torch.cuda.get_device_capability()
    call = replace(FITS, architecture=10 * major + minor)
    return [name for name in LIST_ENGINES if not lacks(name, call)]


ENGINES = _engines()
CASES = cases(
    q_len=st.sampled_from([1, 65, 128, 129, 300]),
    kv_len=st.sampled_from([1, 64, 65, 128, 200, 257, 700]),
    head_dim=st.just(64),
    value_dim=st.just(64),
) | cases(
    q_len=st.sampled_from([1, 128, 300]),
    kv_len=st.sampled_from([64, 65, 257, 700]),
    head_dim=st.just(128),
    value_dim=st.just(128),
)
OTHER_DIMS = cases(
    q_len=st.sampled_from([1, 300]),
    kv_len=st.sampled_from([65, 700]),
    head_dim=st.sampled_from([40, 96]),
    value_dim=st.just(64),
)
ORDERED = layout_cases(head_dim=64, value_dim=64) | layout_cases(head_dim=96, value_dim=72)
DTYPES = st.sampled_from([torch.bfloat16, torch.float16])
CONTROLS = st.one_of(
    st.builds(control, st.sampled_from([0.3, 0.7, 0.9, 1.0])),
    st.builds(control, log2=st.sampled_from([-12.0, -3.0, 0.0])),
)


def planned(x: Inputs, numbers: torch.Tensor, engine: str, **options) -> launch.Output:
    return launch.planned(x.q, x.k, x.v, numbers.to(DEVICE), **x.options, engine=engine, **options)


def made(case: Case, dtype: torch.dtype, engine: str, layout: str = "bhsd") -> Inputs:
    x = case.make(dtype)
    if engine == "fa4":  # which knows no key mask
        x = x.replace(mask=None)
    return laid_out(on_device(x), layout)


def beside_nan(x: torch.Tensor) -> torch.Tensor:
    """The same numbers in rows 8 channels wider, which are NaN: TMA wants multiples of 8."""
    *lengths, dim = x.shape
    room = x.new_full((*lengths, dim + 8), torch.nan)
    return room[..., :dim].copy_(x)


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ENGINES)
class TestOnGpu:
    """What the tests of the Triton kernel say, of every engine."""

    @FEWER
    @given(
        case=CASES,
        numbers=CONTROLS,
        dtype=DTYPES,
        layout=st.sampled_from(["bhsd", "bshd"]),
        rule=st.sampled_from(c.PLANNED_RULES),
    )
    def test_output(
        self,
        engine: str,
        case: Case,
        numbers: torch.Tensor,
        dtype: torch.dtype,
        layout: str,
        rule: str,
    ) -> None:
        x = made(case, dtype, engine, layout)
        got = planned(x, numbers, engine, rule=rule)
        assert c.ENGINES[int(got.measures[c.MEASURE_ENGINE])] == engine
        y = on_cpu(x)
        kept = listed(got.index, got.count, visible_tiles(y).shape[1])
        assert_output(y, kept, got, compensate=False)
        again = planned(x, numbers, engine, rule=rule)  # a race would show as other bits
        assert_same_bits(got, again)

    @FEWER
    @given(case=CASES, dtype=DTYPES)
    def test_nan_rows_keep_to_themselves(self, engine: str, case: Case, dtype: torch.dtype) -> None:
        x = made(case, dtype, engine)
        assert_nan_row_keeps_to_itself(x, lambda x: planned(x, control(0.5), engine))

    @FEWER
    @given(case=CASES, power=st.integers(-3, 3))
    def test_scaling(self, engine: str, case: Case, power: int) -> None:
        """v times 2^a gives out times 2^a, bitwise."""
        x = made(case, torch.bfloat16, engine)
        numbers = control(0.7)
        got = planned(x, numbers, engine)
        scaled = planned(x.replace(v=x.v * 2.0**power), numbers, engine)
        assert same_bits(scaled.out, got.out * 2.0**power)
        assert same_bits(scaled.lse, got.lse)

    def test_batch_and_heads_are_independent(self, engine: str) -> None:
        case = Case(2, kv_heads=2, group=2, q_len=300, kv_len=700, head_dim=64, value_dim=64)
        x = on_device(case.make(torch.float16))
        numbers = control(log2=-2.5)
        got = planned(x, numbers, engine)
        for b in range(2):
            for h in range(4):
                one = x.replace(
                    q=x.q[b : b + 1, h : h + 1],
                    k=x.k[b : b + 1, h // 2 : h // 2 + 1],
                    v=x.v[b : b + 1, h // 2 : h // 2 + 1],
                )
                alone = planned(one, numbers, engine)
                assert same_bits(alone.out[0, 0], got.out[b, h])
                assert same_bits(alone.lse[0, 0], got.lse[b, h])

    def test_more_query_tiles_than_programs(self, engine: str) -> None:
        """Each program takes several, with lists of many lengths."""
        case = Case(2, kv_heads=8, q_len=3000, kv_len=4100, head_dim=128, value_dim=128, seed=1)
        x = on_device(case.make(torch.bfloat16))
        got = planned(x, control(log2=-4.0), engine)
        wanted = planned(x, control(log2=-4.0), "triton")
        assert torch.equal(got.count, wanted.count)
        eps = torch.finfo(torch.bfloat16).eps
        off = (got.out.float() - wanted.out.float()).abs().max()
        assert off <= 2 * eps * x.v.float().abs().max()
        torch.testing.assert_close(got.lse, wanted.lse, rtol=1e-5, atol=1e-5)

    def test_in_a_cuda_graph(self, engine: str) -> None:
        case = Case(kv_heads=2, q_len=300, kv_len=700, head_dim=128, value_dim=128)
        x = on_device(case.make(torch.bfloat16))
        assert_replays(lambda numbers: planned(x, numbers, engine))


def assert_equal_up_to_rounding(got: launch.Output, wanted: launch.Output, x: Inputs) -> None:
    assert torch.equal(got.count, wanted.count)
    assert (got.lse == -torch.inf).equal(wanted.lse == -torch.inf)
    torch.testing.assert_close(got.lse, wanted.lse, rtol=1e-4, atol=1e-4)
    off = (got.out.float() - wanted.out.float()).abs().max()
    assert off <= 4 * torch.finfo(x.v.dtype).eps * x.v.nan_to_num(nan=0.0).float().abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "fa4"])
class TestOwnOnGpu:
    """What FlashAttention-4 does not compute: other head sizes, key masks, token order."""

    @pytest.mark.parametrize(
        ("head_dim", "value_dim"), [(72, 72), (96, 96), (112, 112), (40, 104), (128, 24)]
    )
    @settings(max_examples=10)
    @given(data=st.data(), numbers=CONTROLS, dtype=DTYPES)
    def test_other_head_dims(
        self,
        engine: str,
        head_dim: int,
        value_dim: int,
        data: st.DataObject,
        numbers: torch.Tensor,
        dtype: torch.dtype,
    ) -> None:
        """What lies beside the channels in memory does not count."""
        lengths = {"q_len": st.sampled_from([1, 300]), "kv_len": st.sampled_from([65, 257, 700])}
        dims = {"head_dim": st.just(head_dim), "value_dim": st.just(value_dim)}
        x = on_device(data.draw(cases(**lengths, **dims)).make(dtype))
        x = x.replace(q=beside_nan(x.q), k=beside_nan(x.k), v=beside_nan(x.v))
        got = planned(x, numbers, engine)
        y = on_cpu(x)
        kept = listed(got.index, got.count, visible_tiles(y).shape[1])
        assert_output(y, kept, got, compensate=False)
        again = planned(x, numbers, engine)
        assert_same_bits(got, again)

    @FEWER
    @given(case=CASES, dtype=DTYPES)
    def test_hidden_keys_never_matter(self, engine: str, case: Case, dtype: torch.dtype) -> None:
        x = made(case, dtype, engine)
        assume(x.mask is not None)
        spoilt = x.spoil_hidden()
        got, wanted = planned(spoilt, control(0.8), engine), planned(x, control(0.8), engine)
        assert_same_bits(got, wanted)

    @FEWER
    @given(drawn=ORDERED, dtype=DTYPES, recall=st.sampled_from([0.8, 1.0]))
    def test_token_order(
        self, engine: str, drawn: tuple[Layout, Case], dtype: torch.dtype, recall: float
    ) -> None:
        """In a token order it computes what the Triton kernels do, up to rounding."""
        layout, case = drawn
        x = on_device(case.make(dtype))
        got = planned(x, control(recall), engine, layout=layout)
        wanted = planned(x, control(recall), "triton", layout=layout)
        # Each has a plan of its own, and of near equals they may keep another one; at recall 1
        # and for text there is no choice.
        text = layout.exact_tiles[0] if layout.exact_tiles else wanted.count.shape[-1]
        assert torch.equal(got.count[..., text:], wanted.count[..., text:])
        n_n = wanted.index.shape[-1]
        kept = [listed(out.index.cpu(), out.count.cpu(), n_n) for out in (got, wanted)]
        assert recall < 1 or torch.equal(*kept)
        if torch.equal(*kept):
            assert_equal_up_to_rounding(got, wanted, x)

    @FEWER
    @given(drawn=ORDERED, dtype=DTYPES)
    def test_is_the_filter_of_permuted_tokens(
        self, engine: str, drawn: tuple[Layout, Case], dtype: torch.dtype
    ) -> None:
        """Without text: bit for bit what one gets by permuting q, k, v and mask from outside."""
        layout, case = drawn
        layout, x, moved, order = permuted(layout, case.make(dtype))
        got = planned(on_device(x), control(0.8), engine, layout=layout)
        wanted = planned(on_device(moved), control(0.8), engine)
        assert same_bits(got.out.cpu()[:, :, order], wanted.out.cpu())
        assert same_bits(got.measures, wanted.measures)
        assert same_bits(got.histogram, wanted.histogram)
        assert torch.equal(got.count, wanted.count)

    @FEWER
    @given(
        drawn=layout_cases(head_dim=64, value_dim=64),
        dtype=DTYPES,
        certify=st.sampled_from(c.CERTIFICATES),
    )
    def test_online_in_token_order(
        self, engine: str, drawn: tuple[Layout, Case], dtype: torch.dtype, certify: str
    ) -> None:
        layout, case = drawn
        x = on_device(case.make(dtype))

        def online(by: str) -> launch.Output:
            return launch.online(
                x.q, x.k, x.v, control(0.8).to(DEVICE), **x.options, certify=certify,
                layout=layout, engine=by,
            )  # fmt: skip

        got, wanted = online(engine), online("triton")
        assert_equal_up_to_rounding(got, wanted, x)


@pytest.mark.gpu
@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine == "hopper"])
@FEWER
@given(case=CASES | OTHER_DIMS, dtype=DTYPES)
@example(case=Case(q_len=200, kv_len=90_000, head_dim=128, seed=3), dtype=torch.bfloat16)
@example(
    case=Case(2, q_len=70, kv_len=200_000, head_dim=128, family="banded", mask="lengths"),
    dtype=torch.float16,
)
def test_plan_in_gluon(engine: str, case: Case, dtype: torch.dtype) -> None:
    """It is the reference's, as the Triton kernel's is, and the same each time."""
    x = on_device(case.make(dtype))
    known = centroids(x.k, x.mask, variance_factor=variance_factor(x.scale))

    def found() -> Plan:
        return hopper_plan.plan(x.q, known.stats, known.count, scale=x.scale, keep_energy=True)

    ranked = found()
    assert_plan(case.make(dtype), ranked)
    assert torch.equal(ranked.histogram, found().histogram)
