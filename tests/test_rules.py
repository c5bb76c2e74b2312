"""blockfp8_titan.rules: which Linear, how, and why."""

from pathlib import Path

import pytest

from blockfp8_titan import rules
from blockfp8_titan.recipe import Recipe
from blockfp8_titan.rules import Rule, check_rules_apply, decide, load_rules_file, rules_from

LINEARS = [
    (f"layers.{layer}.{name}", *sizes)
    for layer in range(3)
    for name, sizes in (
        ("attention.wq", (256, 256)),
        ("attention.wk", (256, 64)),
        ("attention.wv", (256, 64)),
        ("feed_forward.w1", (256, 768)),
        ("feed_forward.w2", (768, 256)),
    )
] + [("output", 256, 2048)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"match": 3}, "match = 3: must be a string, a glob on FQNs"),
        ({"action": "konvert"}, "action = 'konvert': must be one of 'convert', 'skip'"),
        ({"reason": 1}, "reason = 1: must be a string"),
        ({"wgrad": "fp4"}, "wgrad = 'fp4': must be one of 'fp8', 'bf16'"),
        ({"gemm_backend": ["auto"]}, r"gemm_backend = \['auto'\]: must be one of 'auto'"),
        ({"min_in_features": -1}, "min_in_features = -1: must be an integer, 0 or more"),
        ({"min_out_features": "1024"}, "min_out_features = '1024': must be an integer"),
        ({"min_out_features": True}, "min_out_features = True: must be an integer"),
    ],
)
def test_a_bad_value_is_named(values, message):
    values = {"match": "*"} | values
    with pytest.raises(ValueError, match=message):
        Rule(**values)
    with pytest.raises(ValueError, match=f"^some.toml rule 2: {message}"):
        rules_from([{"match": "*"}, values], "some.toml")


@pytest.mark.parametrize("values", [{}, {"match": ""}, {"action": "skip", "min_in_features": 1024}])
def test_a_rule_needs_a_match(values):
    message = "match is missing or empty: each rule needs one, a glob on FQNs such as .*, or '\\*' for every Linear"
    with pytest.raises(ValueError, match=f"^{message}"):
        Rule(**values)
    with pytest.raises(ValueError, match=f"^rule 2: {message}"):
        rules_from([{"match": "*"}, values])


def test_an_unknown_key_is_named_with_the_nearest_known_one():
    with pytest.raises(ValueError, match="^rule 1: unknown key 'mach', did you mean 'match'"):
        rules_from([{"mach": "*"}])


def test_an_entry_that_is_no_table_is_refused():
    with pytest.raises(ValueError, match=r"^rule 1: 'layers\.\*': must be a table"):
        rules_from(["layers.*"])


def test_rules_keep_their_place_when_they_are_handed_on():
    placed = rules_from([{"match": "a"}, Rule("b")], "f.toml")
    assert [str(rule) for rule in rules_from(placed)] == ["f.toml rule 1 (match = 'a')", "f.toml rule 2 (match = 'b')"]


@pytest.mark.parametrize(
    ("fqn", "sizes", "action", "reason"),
    [
        ("layers.3.attention.wq", (256, 256), "convert", "in a repeated block"),
        ("model.layers.0.self_attn.q_proj", (4096, 4096), "convert", "in a repeated block"),
        ("output", (4096, 128256), "skip", "outside the repeated blocks"),
        ("layers2.w", (256, 256), "skip", "outside the repeated blocks"),
        ("layers.1.moe.router.gate", (2048, 16), "skip", "router gate"),
        ("layers.1.w", (256, 24), "skip", "out_features = 24 is no positive multiple of 16"),
        ("layers.1.w", (0, 256), "skip", "in_features = 0 is no positive multiple of 16"),
    ],
)
def test_defaults(fqn, sizes, action, reason):
    decision = decide(fqn, *sizes, rules=[])
    assert (decision.action, decision.rule) == (action, "default")
    assert reason in decision.reason
    assert decision.recipe == (Recipe() if action == "convert" else None)


def test_the_first_match_decides_and_sets_only_what_it_names():
    placed = rules_from(
        [
            {"match": "layers.*.w[kv]", "action": "skip", "reason": "narrow"},
            {"match": "layers.0.*", "wgrad": "bf16"},
            {"match": "*", "action": "skip"},
        ]
    )
    section = Recipe(scale_format="pow2")
    skipped = decide("layers.0.attention.wk", 256, 64, placed, section)
    assert (skipped.action, skipped.rule, skipped.reason, skipped.recipe) == ("skip", "rule 1", "narrow", None)
    converted = decide("layers.0.attention.wq", 256, 256, placed, section)
    assert converted.recipe == Recipe(wgrad="bf16", scale_format="pow2")
    assert (converted.rule, converted.reason) == ("rule 2", "match = 'layers.0.*'")
    assert decide("layers.1.attention.wq", 256, 256, placed, section).rule == "rule 3"


def test_a_rule_converts_what_the_defaults_skip_but_not_a_size_that_cannot_be():
    placed = rules_from([{"match": "*"}])
    assert decide("output", 256, 2048, placed).action == "convert"
    assert decide("layers.0.moe.router.gate", 256, 16, placed).action == "convert"
    assert decide("output", 250, 2048, placed).reason == "in_features = 250 is no positive multiple of 16"


def test_names_match_case_sensitively_and_as_a_whole():
    placed = rules_from([{"match": "output", "action": "convert"}])
    assert decide("Output", 256, 256, placed).rule == "default"
    assert decide("output.0", 256, 256, placed).rule == "default"


def test_minimum_sizes_are_part_of_the_match():
    placed = rules_from([{"match": "*", "action": "skip", "min_in_features": 512, "min_out_features": 256}])
    assert decide("layers.0.w", 512, 256, placed).rule == "rule 1"
    assert decide("layers.0.w", 496, 256, placed).rule == "default"
    assert decide("layers.0.w", 512, 240, placed).rule == "default"


def test_a_rule_that_matches_nothing_is_refused_with_names_that_exist():
    placed = rules_from([{"match": "*"}, {"match": "layers.*.atention.w[kv]", "action": "skip"}])
    with pytest.raises(
        ValueError, match=r"^rule 2 \(match = 'layers\.\*\.atention\.w\[kv\]'\) matches no Linear"
    ) as error:
        check_rules_apply(placed, LINEARS)
    assert "did you mean one of" in str(error.value) and "layers.0.attention.wk" in str(error.value)


def test_a_pattern_like_no_name_is_answered_with_one_example_of_each_kind():
    with pytest.raises(ValueError) as error:
        check_rules_apply(rules_from([{"match": "zzz"}]), LINEARS)
    for name in ("layers.0.attention.wq", "layers.0.feed_forward.w2", "output"):
        assert name in str(error.value)
    assert "layers.1." not in str(error.value)


def test_a_minimum_that_nothing_reaches_is_refused_with_the_largest_there_is():
    placed = rules_from([{"match": "layers.*", "min_in_features": 1024}])
    with pytest.raises(ValueError, match="15 have such a name, but none has in_features >= 1024") as error:
        check_rules_apply(placed, LINEARS)
    assert "lower the minimum" in str(error.value)


def test_a_model_without_linears_refuses_every_rule():
    with pytest.raises(ValueError, match="the model has none"):
        check_rules_apply(rules_from([{"match": "*"}]), [])


def test_a_rule_behind_others_that_take_all_is_warned_of():
    placed = rules_from(
        [{"match": "layers.*.wq"}, {"match": "layers.*.w[kv]"}, {"match": "layers.*.attention.*"}, {"match": "*.w1"}]
    )
    (warning,) = check_rules_apply(placed, LINEARS)
    assert warning.startswith("rule 3 (match = 'layers.*.attention.*') never decides: rule 1, rule 2")
    assert "all 9 of its Linears" in warning


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_a_file_is_read_from_a_path(tmp_path):
    path = write(tmp_path / "mine.toml", "[[rules]]\nmatch = 'a'\n[[rules]]\nmatch = 'b'\naction = 'skip'\n")
    first, second = load_rules_file(path)
    assert (first.rule, first.origin) == (Rule("a"), "mine.toml rule 1")
    assert (second.rule, second.origin) == (Rule("b", "skip"), "mine.toml rule 2")


def test_a_bare_name_is_a_preset_unless_such_a_file_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_rules_file("skip_kv")[0].origin == "skip_kv.toml rule 1"
    write(tmp_path / "skip_kv", "[[rules]]\nmatch = 'mine'\n")
    assert load_rules_file("skip_kv")[0].rule.match == "mine"


def test_presets_are_found_beside_the_package_and_inside_it(tmp_path, monkeypatch):
    package = tmp_path / "blockfp8_titan"
    monkeypatch.setattr(rules, "__file__", str(package / "rules.py"))
    for folder, match in ((tmp_path / "configs" / "rules", "checkout"), (package / "configs" / "rules", "installed")):
        folder.mkdir(parents=True)
        write(folder / "some.toml", f"[[rules]]\nmatch = '{match}'\n")
        assert load_rules_file("some")[0].rule.match == match


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("skip_kw", "no such file, did you mean 'skip_kv'?"),
        ("SKIP_KV", "no such file, did you mean 'skip_kv'?"),
        ("skip_kv.tml", "no such file, did you mean 'skip_kv'?"),
        ("no/such.toml", "no such file"),
        ("/", "a folder"),
    ],
)
def test_a_missing_file_is_answered_with_the_presets(name, found):
    with pytest.raises(ValueError) as error:
        load_rules_file(name)
    assert str(error.value).startswith(f"rules_file = '{name}': {found}; give a file's path or one of the presets ")
    assert "skip_kv" in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for name in ("x" * 5000, "~nobody_of_this_name/rules.toml"):
        with pytest.raises(ValueError, match=rf"^rules_file = '{name[:20]}.*give a file's path"):
            load_rules_file(name)
    path = tmp_path / "latin.toml"
    path.write_bytes("[[rules]]\nmatch = '*'\nreason = 'größer'\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.toml': cannot be read: .*; it must be a TOML file in UTF-8"):
        load_rules_file(str(path))


def test_a_file_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "mine.toml", "[[rules]]\nmatch = 'mine'\n")
    assert load_rules_file("~/mine.toml")[0].rule.match == "mine"


@pytest.mark.parametrize("key", ["wgrad", "gemm_backend", "scale_format"])
def test_a_rule_that_skips_and_says_how_to_compute_is_refused(key):
    value = {"wgrad": "bf16", "gemm_backend": "auto", "scale_format": "pow2"}[key]
    with pytest.raises(ValueError, match=f"rule 1: {key} = '{value}' with action = 'skip': .*leave it out, or set"):
        rules_from([{"match": "*", "action": "skip", key: value}])


@pytest.mark.parametrize("entries", ["skip", None, 3, Rule("*"), {"match": "*"}])
def test_rules_that_are_no_list_are_refused(entries):
    with pytest.raises(ValueError, match=r"^rules = .*: must be a list of rules"):
        rules_from(entries)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[rules]]\nmatch = \n", "not valid TOML: .*line 2"),
        ("[[rule]]\nmatch = '*'\n", "unknown top-level key 'rule', did you mean 'rules'"),
        ("# nothing\n", "has no rules"),
        ("rules = 3\n", "has no rules"),
        ("[[rules]]\nmatch = 'a'\n[[rules]]\nmatch = 'b'\naction = 'no'\n", "bad.toml rule 2: action = 'no'"),
        ("[[rules]]\nmatch = 'a'\n[[rules]]\naction = 'skip'\n", "bad.toml rule 2: match is missing or empty"),
        ("[[rules]]\nmin_infeatures = 1\n", "rule 1: unknown key 'min_infeatures', did you mean 'min_in_features'"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path, text, message):
    path = write(tmp_path / "bad.toml", text)
    with pytest.raises(ValueError, match=message) as error:
        load_rules_file(path)
    assert str(error.value).startswith(f"rules_file = {path!r}: ")


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "bad.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="cannot be read"):
        load_rules_file(str(tmp_path / "bad.toml"))
