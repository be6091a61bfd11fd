"""Policy files: equal decisions after a round trip, and a damaged file is an error with a place."""

from __future__ import annotations

import copy
import json
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_policy import NODE

import cef_compile
from cef_compile import (
    Balanced,
    Decision,
    NodePolicy,
    PolicyFormatError,
    Reason,
    Rules,
    Schedule,
    Uniform,
    load_policy,
    save_policy,
)
from cef_compile.policy import (
    CERTIFICATES,
    FILTER_RULES,
    SCORES,
    Calibration,
    Candidate,
    MeasuredNode,
    NodeEntry,
    Tried,
    noise_bands,
)

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

FRACTIONS = st.floats(0, 1, exclude_min=True)
NUMBERS = st.floats(0, 1e300)
TEXTS = st.text(max_size=8)
PATHS = st.sampled_from(["blocks.0.attn1", "blocks.1.attn1", "blocks.0.attn2", ""])


@st.composite
def decisions(draw: st.DrawFn) -> Decision:
    if draw(st.integers(0, 4)) == 0:
        return Decision.dense(draw(st.sampled_from(list(Reason))), draw(TEXTS))
    filter_ = draw(st.sampled_from(sorted(FILTER_RULES)))
    rule = draw(st.sampled_from(FILTER_RULES[filter_]))
    planned = filter_ == "planned"
    ranked = rule in ("top_k", "top_p")
    return Decision(
        draw(FRACTIONS),
        filter_,
        rule,
        "none" if planned else draw(st.sampled_from(CERTIFICATES)),
        not planned and draw(st.booleans()),
        threshold=None if ranked else draw(st.none() | FRACTIONS),
        density=draw(FRACTIONS) if rule == "top_k" else None,
        compensate=planned and draw(st.booleans()),
        scores=draw(st.sampled_from(SCORES)),
        group=draw(st.none() | TEXTS) if rule == "threshold" else None,
        detail=draw(TEXTS),
    )


scores = st.sampled_from(SCORES)
uniforms = st.builds(Uniform, FRACTIONS, scores=scores) | st.builds(
    Uniform,
    FRACTIONS,
    st.just("online"),
    st.sampled_from(["", *CERTIFICATES]),
    st.booleans(),
    scores,
)
balanced = st.builds(Balanced, FRACTIONS, scores)
simple = st.none() | FRACTIONS | decisions() | uniforms | balanced
patterns = PATHS | st.sampled_from(["*", "blocks.*", r"re:blocks\.\d+\.attn1", "[ab]*"])


def rules(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Rules]:
    return st.dictionaries(patterns, values, max_size=4).map(Rules)


# One filter in all bands, since a node cannot change it.
one_filter = st.none() | FRACTIONS | st.builds(Balanced, FRACTIONS)
levels = st.floats(0, 100, exclude_min=True)
schedules = st.builds(
    lambda low, more: Schedule({**more, 0.0: low}),
    one_filter | rules(one_filter),
    st.dictionaries(levels, one_filter | rules(one_filter), max_size=3),
)


@st.composite
def node_policies(draw: st.DrawFn) -> NodePolicy:
    keys = draw(st.lists(st.tuples(PATHS, st.integers(0, 2)), unique=True, min_size=1, max_size=4))
    entries = []
    for path, ordinal in keys:
        decision = draw(decisions())
        bands = {0.0: decision}
        if not decision.is_dense:
            for level in draw(st.lists(levels, max_size=2)):
                bands[level] = draw(st.sampled_from([decision, Decision.dense()]))
        shape = draw(st.tuples(*[st.integers(-1, 1 << 40)] * 4))
        dtype = draw(st.sampled_from(["bfloat16", "float16", "float32"]))
        ordered = tuple(sorted(bands.items()))
        entries.append(NodeEntry(path, ordinal, shape, shape[::-1], dtype, ordered))
    tried = st.builds(Tried, st.none() | FRACTIONS, NUMBERS, NUMBERS, FRACTIONS)
    candidates = st.builds(Candidate, FRACTIONS, NUMBERS, NUMBERS, FRACTIONS)
    calibrations = st.builds(
        Calibration,
        NUMBERS,
        st.integers(1, 99),
        tried,
        *[st.lists(tried, max_size=2).map(tuple)] * 2,
        st.lists(
            st.builds(
                MeasuredNode,
                TEXTS,
                st.integers(0, 3),
                st.none() | NUMBERS,
                st.lists(candidates, max_size=2).map(tuple),
            ),
            max_size=2,
        ).map(tuple),
    )
    return NodePolicy(draw(TEXTS), entries, draw(st.none() | calibrations))


policies = st.one_of(
    uniforms, st.builds(Balanced, FRACTIONS), rules(simple | schedules), schedules, node_policies()
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("policies")


@given(policy=policies)
def test_what_was_saved_decides_the_same(folder: Path, policy: Any) -> None:
    file = folder / "round.json"
    save_policy(policy, file)
    loaded = load_policy(file)
    assert type(loaded) is type(policy)
    for path in ("blocks.0.attn1", "blocks.1.attn1", "blocks.0.attn2", "", "another"):
        for ordinal in (0, 1, 2, 3):
            for k_shape in (NODE.k_shape, (1, 2, 77, 64)):
                node = replace(NODE, path=path, ordinal=ordinal, k_shape=k_shape, kind="cross")
                assert noise_bands(loaded, node) == noise_bands(policy, node)
                assert loaded.decide(node) == policy.decide(node)
    if isinstance(policy, NodePolicy):
        assert (loaded.model, loaded.nodes) == (policy.model, policy.nodes)
        assert loaded.calibration == policy.calibration
    text = file.read_text(encoding="utf-8")
    save_policy(loaded, file)
    assert file.read_text(encoding="utf-8") == text


# --- damage --------------------------------------------------------------------------------------


def entry(path: str = "blocks.0.attn1", ordinal: int = 0, **more: Any) -> NodeEntry:
    bands = ((0.0, Decision(0.9, threshold=0.01)), (0.8, Decision.dense(detail="high noise")))
    shape = (1, 3, 2048, 32)
    fields = {"q_shape": shape, "k_shape": shape, "dtype": "float32", "bands": bands}
    return NodeEntry(path, ordinal, **{**fields, **more})


CALIBRATION = Calibration(
    max_error=0.01,
    calls=6,
    chosen=Tried(None, 0.009, 0.5, 0.4),
    balanced=(Tried(0.95, 0.008, 0.6, 0.5), Tried(0.9, 0.02, 0.4, 0.3)),
    uniform=(Tried(0.95, 0.01, 0.7, 0.6),),
    nodes=(MeasuredNode("blocks.0.attn1", 0, 0.7, (Candidate(0.9, 0.001, 0.02, 0.3),)),),
)
EXAMPLES = {
    "nodes": NodePolicy("WanTransformer3DModel", [entry(), entry(ordinal=1)], CALIBRATION),
    "rules": Rules(
        {
            "blocks.0.attn1": None,
            "blocks.*": 0.9,
            r"re:.*\d": Decision(0.8, rule="top_k", density=0.5),
            "*": Schedule({0.5: Balanced(0.95), 0.0: Rules({"a": 0.5})}),
            "b": Uniform(0.9, "online", "row", True),
            "c": Decision(0.9, "online", bound=True),
            "d": Balanced(0.9, scores="int8"),
        }
    ),
    "balanced": Balanced(0.95),
}


def leaves(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Ways to every value in the data but the whole."""
    if path:
        yield path
    if isinstance(data, dict):
        for key, value in data.items():
            yield from leaves(value, (*path, key))
    elif isinstance(data, list):
        for i, value in enumerate(data):
            yield from leaves(value, (*path, i))


def plain(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def spelled(path: tuple[Any, ...]) -> str:
    return re.sub(r"^\.", "", "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path))


def is_error_or_exact(file: Path) -> PolicyFormatError | None:
    """Either an error that names the file and a place, or exactly what the file says."""
    error = None
    try:
        loaded = load_policy(file)
    except PolicyFormatError as raised:
        error = raised
    if error is not None:
        assert str(error).startswith(f"{file}: {error.place or 'the file'}: ")
        assert error.file == file
        return error
    again = file.with_suffix(".again")
    save_policy(loaded, again)
    assert plain(again) == plain(file)
    return None


LATER = {"bound": False, "scores": "exact"}
"""Keys that the first files did not have, and what they say of such a file."""
JUNK = st.sampled_from(
    ["x", "", None, True, False, 0, 1, -1, 2, 0.5, -0.5, 1.5, 1e308, 10**400, [], {}, [1], {"a": 1}]
)


@pytest.mark.parametrize("name", EXAMPLES)
@given(data=st.data())
@settings(max_examples=300)
def test_any_value_changed_is_an_error_or_taken_as_it_is(folder: Path, name: str, data) -> None:
    file = folder / f"leaf-{name}.json"
    save_policy(EXAMPLES[name], file)
    whole = plain(file)
    path = data.draw(st.sampled_from(list(leaves(whole))))
    parent = whole
    for step in path[:-1]:
        parent = parent[step]
    parent[path[-1]] = data.draw(JUNK)
    file.write_text(json.dumps(whole), encoding="utf-8")
    is_error_or_exact(file)


@pytest.mark.parametrize("name", EXAMPLES)
@given(data=st.data())
@settings(max_examples=300)
def test_any_byte_changed_is_an_error_or_taken_as_it_is(folder: Path, name: str, data) -> None:
    file = folder / f"byte-{name}.json"
    save_policy(EXAMPLES[name], file)
    content = bytearray(file.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] = data.draw(st.integers(0, 255) | st.sampled_from(b'"{}[]:,.0e-'))
    file.write_bytes(content)
    is_error_or_exact(file)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_truncated_file_is_an_error(folder: Path, name: str) -> None:
    file = folder / f"cut-{name}.json"
    save_policy(EXAMPLES[name], file)
    content = file.read_bytes().rstrip()
    for length in range(0, len(content), 7):
        file.write_bytes(content[:length])
        error = is_error_or_exact(file)
        assert error is not None
        assert error.place.startswith("line ")


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_key_is_needed_and_no_other_is_known(folder: Path, name: str) -> None:
    file = folder / f"key-{name}.json"
    save_policy(EXAMPLES[name], file)
    whole = plain(file)
    for path in leaves(whole):
        if isinstance(path[-1], int):
            continue
        for key in (None, "recal"):
            changed = copy.deepcopy(whole)
            parent = changed
            for step in path[:-1]:
                parent = parent[step]
            if key is None:
                if path[-1] in LATER:
                    continue
                del parent[path[-1]]
            else:
                parent[key] = 0.5
            file.write_text(json.dumps(changed), encoding="utf-8")
            error = is_error_or_exact(file)
            assert error is not None
            assert error.place == spelled((*path[:-1], *([key] if key else [])))
            assert ("is missing" if key is None else "unknown key; known here") in str(error)


@pytest.mark.parametrize("policy", [*EXAMPLES.values(), Uniform(0.9, "online")], ids=repr)
def test_a_file_from_before_a_key_says_what_it_said_then(folder: Path, policy: Any) -> None:
    file = folder / "before.json"
    save_policy(policy, file)
    whole = plain(file)
    old = copy.deepcopy(whole)
    for path in leaves(whole):
        parent = old
        for step in path[:-1]:
            parent = parent[step]
        if path[-1] in LATER and parent[path[-1]] is LATER[path[-1]]:
            del parent[path[-1]]
    file.write_text(json.dumps(old), encoding="utf-8")
    save_policy(load_policy(file), file)
    assert plain(file) == whole


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("version",), 2, "version: this release reads version 1, got 2"),
        (("version",), "1", "version: must be an integer, got '1'"),
        (("format",), "flux", "format: must be one of 'cef_compile policy', got 'flux'"),
        (("kind",), "node", "kind: must be one of .*got 'node'"),
        (("kind",), "decision", "unknown key|is missing"),
        (("nodes",), [], "nodes: .*needs at least one node"),
        (("nodes",), {}, "nodes: must be a list, got an object"),
        (("nodes", 1, "ordinal"), 0, r"nodes\[1\]: node blocks.0.attn1#0 is given twice"),
        (("nodes", 1, "ordinal"), -1, r"nodes\[1\]\.ordinal: must be at least 0, got -1"),
        (("nodes", 0, "dtype"), "float", r"nodes\[0\]\.dtype: must be one of|float"),
        (("nodes", 0, "q_shape", 2), 1.5, r"nodes\[0\]\.q_shape\[2\]: must be an integer, got 1.5"),
        (("nodes", 0, "q_shape"), [1], r"nodes\[0\]\.q_shape: a shape ends with"),
        (("nodes", 0, "bands", 0, "recall"), 1.5, r"nodes\[0\]\.bands\[0\]\.recall: must be in"),
        (("nodes", 0, "bands", 0, "recall"), True, r"recall: must be a number, got true"),
        (("nodes", 0, "bands", 0, "recall"), math.nan, r"recall: must be a number, got NaN"),
        (("nodes", 0, "bands", 0, "recall"), -math.inf, r"must be a number, got -Infinity"),
        (("nodes", 0, "bands", 0, "recall"), 10**400, r"must be at least 0 and finite, got a huge"),
        (("nodes", 0, "bands", 0, "rule"), "", r"bands\[0\]\.rule: must be one of .*got ''"),
        (("nodes", 0, "bands", 0, "scores"), "int4", r"bands\[0\]\.scores: must be .*'int8'"),
        (("nodes", 0, "bands", 0, "bound"), 1, r"bands\[0\]\.bound: must be true or false, got 1"),
        (("nodes", 0, "bands", 0, "bound"), True, r"bands\[0\]: bound=True needs filter='online'"),
        (("nodes", 0, "bands", 0, "density"), 0.5, r"bands\[0\]: rule='top_k' and density"),
        (("nodes", 0, "bands", 1, "reason"), None, r"reason: a dense node has a reason"),
        (("nodes", 0, "bands", 1, "reason"), "WHIM", r"reason: must be one of .*got 'WHIM'"),
        (("nodes", 0, "bands", 1, "from"), 0.0, r"nodes\[0\]\.bands: .*ascend, got \[0\.0, 0\.0\]"),
        (("calibration", "chosen", "error"), -1, r"calibration\.chosen\.error: must be at least 0"),
        (("calibration", "calls"), 0, r"calibration\.calls: must be at least 1"),
    ],
)
def test_an_error_says_what_is_wrong_and_where(folder: Path, path, value, says: str) -> None:
    file = folder / "says.json"
    save_policy(EXAMPLES["nodes"], file)
    whole = plain(file)
    parent = whole
    for step in path[:-1]:
        parent = parent[step]
    parent[path[-1]] = value
    file.write_text(json.dumps(whole), encoding="utf-8")
    with pytest.raises(PolicyFormatError, match=f"^{re.escape(str(file))}: .*(?:{says})"):
        load_policy(file)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "line 1, column 1: no JSON"),
        (b"\xff{}", "byte 0: no UTF-8"),
        (b"[]", "the file: must be an object, got a list"),
        (b"NaN", "the file: must be an object, got NaN"),
        (b"[" * 100_000, "no JSON that can be read"),
        (b'{"format": "cef_compile policy", "format": 1}', "format: the key is given twice"),
        (
            b'{"format": "cef_compile policy", "version": 1, "kind": "rules", "rules":'
            b' [{"pattern": "re:(", "value": 0.5}]}',
            r"rules\[0\]\.pattern: rule 're:\(' is no regular expression",
        ),
        (
            b'{"format": "cef_compile policy", "version": 1, "kind": "rules", "rules":'
            b' [{"pattern": "a", "value": 0.5}, {"pattern": "a", "value": 0.6}]}',
            r"rules\[1\]\.pattern: the pattern 'a' is given twice",
        ),
        (
            b'{"format": "cef_compile policy", "version": 1, "kind": "schedule", "bands":'
            b' [{"from": 0.5, "value": 0.5}, {"from": 0.5, "value": 0.6}]}',
            r"bands\[1\]\.from: the bands must descend",
        ),
        (
            b'{"format": "cef_compile policy", "version": 1, "kind": "schedule", "bands":'
            b' [{"from": 0.5, "value": 0.5}]}',
            "bands: the schedule says nothing of noise levels below 0.5",
        ),
    ],
)
def test_damage_of_other_kinds(folder: Path, content: bytes, says: str) -> None:
    file = folder / "other.json"
    file.write_bytes(content)
    with pytest.raises(PolicyFormatError, match=says):
        load_policy(file)


def test_a_missing_file_is_the_systems_error(folder: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_policy(folder / "none.json")


def test_code_cannot_be_saved_and_leaves_the_file_alone(folder: Path) -> None:
    class Mine:
        def decide(self, node):
            return Decision(0.9)

    file = folder / "code.json"
    save_policy(Balanced(0.9), file)
    before = file.read_bytes()
    for policy, where in (
        (Mine(), "the policy cannot be saved: .*Mine.* is code of your own"),
        (lambda node: 0.9, "the policy cannot be saved"),
        (Rules({"a": Mine()}), "rule 'a' cannot be saved"),
        (Schedule({0.0: Rules({"a": lambda node: 0.9})}), "rule 'a' cannot be saved"),
        (0.9, "the policy cannot be saved: 0.9"),
    ):
        with pytest.raises(TypeError, match=where):
            save_policy(policy, file)
    assert file.read_bytes() == before
    assert not list(folder.glob("*.new"))


# --- frozen policies -----------------------------------------------------------------------------


def stack(backend: Any, regional: bool = False, seed: int = 0, depth: int = 3) -> Any:
    torch.manual_seed(seed)
    model = models.Stack(depth)
    for module in model.blocks if regional else [model]:
        module.compile(backend=backend)
    return model


def backend_of(policy: Any) -> Any:
    return cef_compile.backend(policy=policy, inner="eager")


@torch.no_grad()
@pytest.mark.parametrize("regional", [False, True])
@pytest.mark.parametrize("passes", [1, 3])
def test_a_frozen_policy_does_what_the_next_pass_does(folder, regional: bool, passes: int) -> None:
    backend = backend_of(Balanced(0.7))
    model, x = stack(backend, regional), models.tokens()
    for seed in range(passes):
        model(models.tokens(seed=seed))
    file = folder / "frozen.json"
    save_policy(backend.frozen_policy(), file)
    policy = load_policy(file)
    assert backend.frozen_policy().nodes == policy.nodes
    thresholds = {band.threshold for entry in policy.nodes for _, band in entry.bands}
    assert len(thresholds) == 1
    expected = model(x)
    assert {node.threshold for node in backend.report.nodes} == thresholds
    torch._dynamo.reset()
    other = backend_of(policy)
    again = stack(other, regional)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):  # nothing that ran before counts any more
            assert torch.equal(again(x), expected)
    assert repr(policy) == "NodePolicy(Stack, 3 of 3 nodes filtered)"


@torch.no_grad()
def test_code_can_be_frozen_and_then_saved(folder: Path) -> None:
    backend = backend_of(lambda node: None if node.path == "blocks.1" else 0.6)
    model, x = stack(backend), models.tokens()
    expected = model(x)
    save_policy(backend.frozen_policy(model), folder / "mine.json")
    policy = load_policy(folder / "mine.json")
    assert [entry.bands[0][1].recall for entry in policy.nodes] == [0.6, None, 0.6]
    torch._dynamo.reset()
    assert torch.equal(stack(backend_of(policy))(x), expected)


@torch.no_grad()
def test_what_cannot_be_frozen_says_why() -> None:
    backend = backend_of(Balanced(0.7))
    with pytest.raises(RuntimeError, match="run the compiled model once"):
        backend.frozen_policy()
    model, x = stack(backend), models.tokens()
    with backend.dense():
        model(x)
    with pytest.raises(RuntimeError, match=r"blocks\.0#0 has not found its threshold yet"):
        backend.frozen_policy()
    with pytest.raises(ValueError, match="has not compiled this Stack"):
        backend.frozen_policy(models.Stack())
    model(x)
    stack(backend)(x)
    with pytest.raises(ValueError, match=r"several models \(Stack 1, Stack 2\)"):
        backend.frozen_policy()
    assert backend.frozen_policy(model).model == "Stack"
    torch._dynamo.reset()
    scheduled = backend_of(Schedule({0.5: None, 0.0: Balanced(0.7)}))
    scheduled.set_noise_level(0.1)
    stack(scheduled)(x)
    with pytest.raises(ValueError, match="freeze one without a schedule"):
        scheduled.frozen_policy()


# --- used elsewhere ------------------------------------------------------------------------------


def made_for(**more: Any) -> NodePolicy:
    shape = (1, 2, 640, 16)
    fields = {"q_shape": shape, "k_shape": shape, **more}
    return NodePolicy("Stack", [entry(f"blocks.{i}", 0, **fields) for i in range(3)])


@torch.no_grad()
@pytest.mark.parametrize("regional", [False, True])
@pytest.mark.parametrize(
    ("policy", "length", "depth", "says"),
    [
        (made_for(), 640, 3, []),
        (made_for(), 704, 3, ["made for 640 x 640, now 704 x 704"]),
        (made_for(), 640, 4, [r"it does not know blocks\.3#0, dense for that reason"]),
        (made_for(), 640, 2, [r"decisions on blocks\.2#0, which the model lacks"]),
        (made_for(dtype="bfloat16"), 640, 3, [r"made for bfloat16, now float32"]),
        (
            NodePolicy("Other", [entry("layers.0")]),
            640,
            3,
            [
                "it was made for Other, and this is Stack",
                r"does not know blocks\.0#0, blocks\.1#0, blocks\.2#0, dense",
                r"decisions on layers\.0#0",
            ],
        ),
    ],
    ids=["fits", "size", "unknown", "missing", "dtype", "model"],
)
def test_another_model_or_size_warns_once(policy, length, depth, says, regional: bool) -> None:
    if regional and policy.model == "Other":
        says = says[:2]  # nothing is filtered, so no pass is ever seen to be whole
    backend = backend_of(policy)
    backend.set_noise_level(0.5)
    model = stack(backend, regional, depth=depth)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            model(models.tokens(length))
    messages = [str(w.message) for w in caught if "the policy fits" in str(w.message)]
    assert len(messages) == len(says)
    for message, pattern in zip(messages, says, strict=True):
        assert re.search(f"the policy fits this model only in part: .*{pattern}", message)
    assert not [w for w in caught if "matches no attention node" in str(w.message)]


@torch.no_grad()
def test_a_policy_that_is_set_later_warns_as_well() -> None:
    backend = backend_of(Uniform(0.9))
    model = stack(backend)
    for _ in range(2):
        model(models.tokens(704))
    backend.set_noise_level(0.5)
    with pytest.warns(UserWarning, match="made for 640 x 640, now 704 x 704"):
        backend.set_policy(made_for())
    assert [node.recall for node in backend.report.nodes] == [0.9] * 3


@pytest.mark.parametrize(
    ("q_shape", "k_shape", "fits"),
    [
        ((1, 1, 640, 16), (1, 1, 640, 16), True),  # a rank's heads
        ((1, 2, 320, 16), (1, 2, 640, 16), True),  # a rank's queries
        ((1, 1, 160, 16), (1, 1, 640, 16), True),  # both
        ((1, 3, 640, 16), (1, 3, 640, 16), False),
        ((1, 4, 640, 16), (1, 4, 640, 16), False),
        ((1, 2, 300, 16), (1, 2, 640, 16), False),
        ((1, 2, 320, 16), (1, 2, 320, 16), False),
        ((1, 2, 640, 8), (1, 2, 640, 8), False),
    ],
)
def test_what_a_rank_has_of_a_node_is_no_difference(q_shape, k_shape, fits: bool) -> None:
    nodes = [replace(NODE, path="blocks.0", q_shape=q_shape, k_shape=k_shape)]
    assert ("size" in made_for().differences("Stack", nodes, complete=False)) is not fits


def test_a_batch_of_another_size_is_no_difference() -> None:
    policy = made_for()
    nodes = [
        replace(NODE, path=f"blocks.{i}", q_shape=(4, 2, 640, 16), k_shape=(4, 2, 640, 16))
        for i in range(3)
    ]
    assert set(policy.differences("Stack", nodes, complete=True)) == {"dtype"}


def test_a_node_policy_holds_together() -> None:
    with pytest.raises(ValueError, match="needs at least one node"):
        NodePolicy("Stack", [])
    with pytest.raises(ValueError, match=r"blocks\.0\.attn1#0 is given twice"):
        NodePolicy("Stack", [entry(), entry()])
    with pytest.raises(ValueError, match="must begin at 0 and ascend"):
        NodePolicy("Stack", [entry(bands=((0.5, Decision(0.9)),))])
    mixed = ((0.0, Decision(0.9)), (0.5, Decision(0.9, "online")))
    with pytest.raises(ValueError, match="want different filters"):
        NodePolicy("Stack", [entry(bands=mixed)])
    unknown = made_for().decide(replace(NODE, path="blocks.0", ordinal=1))
    assert (unknown.is_dense, unknown.detail) == (True, "the policy knows no such call")
