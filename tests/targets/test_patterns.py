"""What patterns match, and the shortest that name modules again."""

import pytest
from torch import nn

from lightning_peft import PEFTError
from lightning_peft.core.view import ModelView
from lightning_peft.targets import naming, patterns

NAME = "model.layers.11.self_attn.q_proj"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("q_proj", True),
        ("proj", False),
        ("self_attn.q_proj", True),
        ("attn.q_proj", False),
        (NAME, True),
        (f"x.{NAME}", False),
        ("layers.*.self_attn.*", True),
        ("layers.*.q_proj", False),
        ("layers.**.q_proj", True),
        ("ayers.**.q_proj", False),
        ("*", True),
        ("*proj", True),
        ("q*", True),
        ("layers.1*.self_attn.q_proj", True),
        ("layers.2*.self_attn.q_proj", False),
        ("**", True),
        ("layers.?1.self_attn.q_proj", False),
        ("self_attnXq_proj*", False),
        ("re:.*q_proj", True),
        ("re:q_proj", False),
        ("re:.*_attn", False),
        (r"re:model\.layers\.\d+\..*\.(q|v)_proj", True),
        ("", False),
    ],
)
def test_what_a_pattern_matches(pattern: str, expected: bool) -> None:
    assert patterns.matches(pattern, NAME) is expected
    assert patterns.Matcher(["other", NAME])(pattern) == patterns.match_names(pattern, ["other", NAME])
    assert (NAME in patterns.match_names(pattern, ["other", NAME])) is expected


def test_regular_expressions_have_a_length() -> None:
    assert not patterns.matches("re:" + "a" * 2000, NAME)
    with pytest.raises(PEFTError, match="A pattern of 2001 characters was given; 2000 is the limit"):
        patterns.matches("re:" + "a" * 2001, NAME)


def test_malformed_and_slow_ones_are_refused() -> None:
    with pytest.raises(PEFTError, match=r"'\(' is malformed"):
        patterns.matches("re:(", NAME)
    with pytest.raises(PEFTError, match=r"took more than 0\.5 s on"):
        patterns.matches("re:(a|a|aa)+$", "a" * 40 + "b")


def test_the_patterns_of_a_file_have_a_second_together(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 100))
    monkeypatch.setattr(patterns, "thread_time", lambda: next(clock) * 0.4)
    with patterns.patterns_of_a_file():
        assert patterns.matches("re:.*", NAME)
        assert patterns.matches("re:.*", NAME)
        with pytest.raises(PEFTError, match=r"The file's patterns took more than 1\.0 s, the last of them '\.\+'"):
            patterns.matches("re:.+", NAME)
    for _ in range(9):
        assert patterns.matches("re:.*", NAME)


def test_endings_and_exceptions() -> None:
    assert list(patterns.endings("a.b.c")) == ["a.b.c", "b.c", "c"]
    values = {"a.x": 1, "x": 2, "b.y": 3, "c.y": 1}
    assert naming.exceptions(values, 1, naming.only_here) == {"re:x": 2, "b.y": 3}
    assert naming.exceptions(values, 3, naming.only_here) == {"a.x": 1, "re:x": 2, "c.y": 1}


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        (["a.q", "b.q"], ["q"]),
        (["a.q"], ["a.q"]),
        (["a.q", "b.q", "a.v"], ["a.q", "a.v", "b.q"]),
        (["q"], None),
    ],
)
def test_endings_that_name_modules_and_no_others(hosts: list[str], expected: list[str] | None) -> None:
    modules = ["a", "b", "a.q", "b.q", "a.v", "b.v", *(["q"] if expected is None else [])]
    assert naming.suffixes(hosts, modules) == expected


def test_where_no_ending_names_a_module_alone_its_whole_name_does() -> None:
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("q", "v")})
    model["inner"] = nn.ModuleDict({"q": nn.Linear(2, 2), "v": nn.Linear(2, 2)})
    pattern = naming.targets_from(["v", "q"], ModelView(model))
    assert isinstance(pattern, str)
    assert patterns.match_names(pattern, ModelView(model).modules) == {"q", "v"}


def test_patterns_for_names_among_others() -> None:
    among = ["l.0.q", "l.1.q", "l.0.v", "l.1.v", "h.0.w", "h.1.w"]
    assert patterns.patterns_for(["l.0.q", "l.1.q"], among) == ["q"]
    assert patterns.patterns_for(["l.0.q"], among) == ["l.0.q"]
    assert patterns.patterns_for(["h.0", "h.1"], [*among, "h.0", "h.1"]) == ["h.*"]


def test_the_first_that_matches_counts_but_for_the_name_itself() -> None:
    table = {"q": 1, "a.q": 2, "v": 3}
    assert [patterns.first_match(table, name, 0) for name in ("a.q", "b.q", "b.v", "b.k")] == [2, 1, 3, 0]


@pytest.mark.parametrize(
    ("targets", "name", "expected"),
    [
        ("attention", "a.q", True),
        (["attention", "q"], "a.q", False),
        (["q"], "a.v", False),
        (["mlp", "v"], "a.q", True),
    ],
)
def test_what_a_preset_alone_finds(targets: list[str] | str, name: str, expected: bool) -> None:
    assert patterns.found_by_preset(targets, name) is expected


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("q_prj", "'q_prj' matches no module. Nearest names: q_proj"),
        ("zzz", "matches no module. Nearest names: k_proj, q_proj"),
        ("Attentions", "Nearest names: attention"),
        ("attn", "'attn' matches only modules that cannot be adapted (int). Name the modules inside: l.attn.q_proj."),
        ("norm", "'norm' matches only modules that cannot be adapted (str)."),
    ],
)
def test_what_to_say_where_nothing_matches(pattern: str, words: str) -> None:
    modules = {"l.attn": 1, "l.attn.q_proj": 1.0, "l.k_proj": 1.0, "l.norm": "a"}
    candidates = {"l.attn.q_proj": 1.0, "l.k_proj": 1.0}
    said = patterns.nothing_matched(pattern, modules, candidates)
    assert said.startswith("target_modules: ")
    assert words in said
    with pytest.raises(PEFTError, match="layers: 'zzz' matches no module"):
        patterns.require_matches(["q_proj", "zzz"], candidates, "layers")
