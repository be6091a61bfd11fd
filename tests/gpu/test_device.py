"""What only a GPU can show: repeats, graphs, long sequences, real sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import control, same_bits

from cef_compile.kernels import config as c
from cef_compile.kernels import launch
from cef_compile.kernels import reference as ref

pytestmark = pytest.mark.gpu

RUNS = {
    "planned": (launch.planned, {}),
    "compensated": (launch.planned, {"compensate": True}),
    "top_k": (launch.planned, {"rule": "top_k"}),
    "top_p": (launch.planned, {"rule": "top_p"}),
    "online": (launch.online, {"certify": "none"}),
    "online by bounds": (launch.online, {"certify": "none", "bound": True}),
    "certified": (launch.online, {"certify": "mean"}),
}


def attention_like(
    batch: int, heads: int, length: int, dim: int, *, kv_len: int | None = None, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """bf16 q, k, v whose neighbours attend to each other, in (B, L, H, D) memory order."""
    draw = torch.Generator("cuda").manual_seed(seed)

    def features(n: int) -> torch.Tensor:
        angle = torch.linspace(0, 40, n, device="cuda")[:, None]
        rates = torch.logspace(-2, 0, dim // 2, device="cuda")
        waves = torch.cat(((angle * rates).cos(), (angle * rates).sin()), -1)
        noise = torch.randn(batch, n, heads, dim, generator=draw, device="cuda")
        return (1.5 * waves[None, :, None] + 0.5 * noise).bfloat16().transpose(1, 2)

    k = features(kv_len or length)
    return features(length), k, torch.randn(k.shape, generator=draw, device="cuda").bfloat16()


def kept_mask(result: launch.Output) -> torch.Tensor:
    valid = torch.arange(result.index.shape[-1], device="cuda") < result.count[..., None]
    tiles = torch.where(valid, result.index.long(), 0)
    return torch.zeros(valid.shape, device="cuda").scatter_add_(-1, tiles, valid.float()) > 0


@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("lengths", [(1024, 2048), (1000, 3111)])
def test_error_is_that_of_dense_bf16(dim: int, lengths: tuple[int, int]) -> None:
    """At most twice dense bf16 SDPA's error against float64, on the same kept set."""
    q, k, v = attention_like(1, 2, lengths[0], dim, kv_len=lengths[1])
    scale = dim**-0.5
    got = launch.planned(q, k, v, control(0.8).cuda(), scale=scale)
    kept = kept_mask(got)
    assert 0.02 < kept.float().mean() < 0.9
    exact, lse = ref.attend(q.double(), k.double(), v.double(), kept, scale)
    seen = kept.repeat_interleave(c.BLOCK_M, 2).repeat_interleave(c.BLOCK_N, 3)
    seen = seen[..., : lengths[0], : lengths[1]]
    plain = F.scaled_dot_product_attention(q, k, v, seen, scale=scale)
    error, theirs = (got.out - exact).abs(), (plain - exact).abs()
    assert error.max() <= 2 * theirs.max()
    assert error.mean() <= 1.1 * theirs.mean()
    assert (got.lse - lse).abs().max() < 1e-4


@pytest.mark.parametrize("name", RUNS)
def test_a_thousand_repeats_are_bitwise_equal(name: str) -> None:
    function, options = RUNS[name]
    q, k, v = attention_like(2, 4, 900, 64, kv_len=1300)
    numbers = control(0.8).cuda()
    first = function(q, k, v, numbers, scale=0.125, **options)
    for _ in range(1000):
        again = function(q, k, v, numbers, scale=0.125, **options)
        for a, b in zip(
            (first.out, first.lse, first.histogram, first.measures),
            (again.out, again.lse, again.histogram, again.measures),
            strict=True,
        ):
            assert same_bits(a, b)


@pytest.mark.parametrize("name", RUNS)
def test_cuda_graph_replays_with_another_control(name: str) -> None:
    function, options = RUNS[name]
    q, k, v = attention_like(1, 4, 1024, 64)
    numbers = control(0.9).cuda()

    def call() -> launch.Output:
        return function(q, k, v, numbers, scale=0.125, audited=True, **options)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for recall in (0.5, 0.95):
        numbers.copy_(control(recall, seed=7))
        graph.replay()
        wanted = call()
        assert same_bits(captured.out, wanted.out)
        assert same_bits(captured.measures, wanted.measures)


@pytest.mark.parametrize("name", ["planned", "online"])
def test_nothing_waits_for_the_device(name: str) -> None:
    function, options = RUNS[name]
    q, k, v = attention_like(1, 2, 700, 64)
    numbers = control(0.9).cuda()
    mask = torch.arange(700, device="cuda")[None] < 650
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(q, k, v, numbers, scale=0.125, key_mask=mask, audited=True, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["planned", "online"])
def test_past_2_to_31_elements(name: str) -> None:
    """The last head of a tensor of more than 2^31 elements equals the same head alone."""
    function, options = RUNS[name]
    length, dim, heads = 4096, 128, 4104
    assert length * dim * heads > 2**31
    base = torch.empty(1, length, heads, dim, dtype=torch.bfloat16, device="cuda")
    base[:, :, -1:] = attention_like(1, 1, length, dim)[1].transpose(1, 2)
    x = base.transpose(1, 2)[:, -1:]
    numbers = control(0.8).cuda()
    got = function(x, x, x, numbers, scale=0.09, **options)
    alone = x.contiguous()
    wanted = function(alone, alone, alone, numbers, scale=0.09, **options)
    assert same_bits(got.out, wanted.out)
    # And all heads at once, out of which the last is looked at.
    del got
    base[:, :, :-1] = base[:, :, -1:]
    whole = base.transpose(1, 2)
    result = function(whole, whole, whole, control(0.8, log2=-4.0).cuda(), scale=0.09, **options)
    one = function(alone, alone, alone, control(0.8, log2=-4.0).cuda(), scale=0.09, **options)
    assert same_bits(result.out[:, -1:], one.out)
    assert same_bits(result.out[:, :1], one.out)


def test_pointers_equal_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on GPUs without TMA gives the same bits here."""
    q, k, v = attention_like(1, 2, 1000, 128, kv_len=1500)
    numbers = control(0.8).cuda()
    # Of the engines only "triton" reads either way.
    options = {"scale": 0.09, "engine": "triton"}
    for function in (launch.planned, launch.online):
        fast = function(q, k, v, numbers, **options)
        with monkeypatch.context() as patched:
            patched.setattr(launch, "_descriptors", lambda k, v: False)
            plain = function(q, k, v, numbers, **options)
        assert same_bits(fast.out, plain.out)


def test_margins_stay_unread_and_unwritten() -> None:
    """NaN round every input, a pattern round nothing that is written but the output."""
    q, k, v = attention_like(1, 2, 333, 64, kv_len=777)
    wanted = launch.planned(q, k, v, control(0.8).cuda(), scale=0.125)

    def framed(t: torch.Tensor) -> torch.Tensor:
        batch, heads, length, dim = t.shape
        room = t.new_full((batch, length + 512, heads + 2, dim), torch.nan)
        view = room[:, 256 : 256 + length, 1:-1].transpose(1, 2)
        return view.copy_(t)

    inputs = [framed(t) for t in (q, k, v)]
    got = launch.planned(*inputs, control(0.8).cuda(), scale=0.125)
    assert same_bits(got.out, wanted.out)


def test_workspace_is_small() -> None:
    """At most 5 % of q, k and v at 32k tokens and 10 % at 128k, the output aside."""
    for length, limit in ((32768, 0.05), (131072, 0.10)):
        q, k, v = (
            torch.randn(1, length, 2, 128, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
            for _ in range(3)
        )
        numbers = control(0.5).cuda()
        launch.planned(q, k, v, numbers, scale=0.09)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = launch.planned(q, k, v, numbers, scale=0.09)
        used = torch.cuda.max_memory_allocated() - before
        outputs = result.out.nbytes + result.lse.nbytes
        assert used - outputs <= limit * 3 * q.nbytes, f"{(used - outputs) / 3 / q.nbytes:.1%}"
