"""blockfp8_titan.config through torchtitan's own ConfigManager: TOML, command line, errors, serialisation."""

import json

import pytest
from torchtitan.config import ConfigManager

from blockfp8_titan.config import BlockwiseFP8
from blockfp8_titan.recipe import Recipe
from blockfp8_titan.rules import Rule

TOML = """
[job]
custom_config_module = "blockfp8_titan.config"
[blockwise_fp8]
wgrad = "bf16"
fp8_all_gather = true
[[blockwise_fp8.rules]]
match = "layers.*.attention.w[kv]"
action = "skip"
[[blockwise_fp8.rules]]
match = "layers.*.feed_forward.*"
wgrad = "fp8"
min_in_features = 1024
"""


@pytest.fixture
def read(tmp_path):
    """The job config of a TOML text and overrides."""

    def read(text, *overrides):
        path = tmp_path / "job.toml"
        path.write_text(text)
        return ConfigManager().parse_args(["--job.config_file", str(path), *overrides])

    return read


def test_the_section_of_a_toml(read):
    section = read(TOML).blockwise_fp8
    assert section.recipe() == Recipe(wgrad="bf16")
    assert section.fp8_all_gather is True
    assert section.rules == [
        Rule("layers.*.attention.w[kv]", "skip"),
        Rule("layers.*.feed_forward.*", wgrad="fp8", min_in_features=1024),
    ]
    assert [placed.origin for placed in section.all_rules()] == ["rule 1", "rule 2"]


def test_the_defaults(read):
    section = read('[job]\ncustom_config_module = "blockfp8_titan.config"\n').blockwise_fp8
    assert section == BlockwiseFP8()
    assert section.recipe() == Recipe()
    assert section.all_rules() == []


def test_overrides(read):
    section = read(
        TOML,
        "--blockwise_fp8.gemm_backend=reference",
        "--blockwise_fp8.scale_format=pow2",
        "--blockwise_fp8.fp8_all_gather=false",
        "--blockwise_fp8.fuse=off",
        "--blockwise_fp8.swiglu_inputs=fp8",
        "--blockwise_fp8.ac_save=none",
        "--blockwise_fp8.health_freq=50",
        "--blockwise_fp8.rules.0.match=layers.0.*",
        "--blockwise_fp8.rules.1.wgrad=None",
        "--blockwise_fp8.rules.1.min_in_features=16",
        "--blockwise_fp8.rules_file=skip_kv",
    ).blockwise_fp8
    assert section.recipe() == Recipe("reference", "bf16", "pow2")
    assert section.fp8_all_gather is False
    assert (section.fuse, section.swiglu_inputs, section.ac_save, section.health_freq) == ("off", "fp8", "none", 50)
    assert section.rules == [Rule("layers.0.*", "skip"), Rule("layers.*.feed_forward.*", min_in_features=16)]
    assert [placed.origin for placed in section.all_rules()] == ["skip_kv.toml rule 1", "rule 1", "rule 2"]


@pytest.mark.parametrize(
    ("args", "value"),
    [
        (["--blockwise_fp8.fp8_all_gather", "false"], False),
        (["--blockwise-fp8.fp8-all-gather=False"], False),
        (["--blockwise_fp8.fp8_all_gather=true"], True),
    ],
)
def test_the_spellings_of_a_boolean(read, args, value):
    assert read(TOML, *args).blockwise_fp8.fp8_all_gather is value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--blockwise_fp8.fp8_all_gather=maybe", "invalid choice 'maybe'"),
        ("--blockwise_fp8.wgrad=fp4", "invalid choice 'fp4'"),
        ("--blockwise_fp8.ac_save=all", "invalid choice 'all'"),
        ("--blockwise_fp8.rules.0.action=drop", "invalid choice 'drop'"),
        ("--blockwise_fp8.rules.1.min_in_features=-1", "blockwise-fp8.rules.1: min_in_features = -1"),
        ("--blockwise_fp8.rules.1.match=", "blockwise-fp8.rules.1: match is missing or empty"),
        ("--blockwise_fp8.rules.2.match=x", "rules.2.match=x"),
    ],
)
def test_a_bad_override_ends_the_run_with_its_name(read, capsys, override, message):
    with pytest.raises(SystemExit) as exit:
        read(TOML, override)
    assert exit.value.code == 2
    printed = capsys.readouterr()
    assert message in " ".join((printed.out + printed.err).replace("│", " ").split())


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("wgrad = 'fp4'", r"^\[blockwise_fp8\] wgrad = 'fp4': must be one of 'fp8', 'bf16'"),
        ("gemm_backend = 1", r"^\[blockwise_fp8\] gemm_backend = 1: must be one of 'auto'"),
        ("health_freq = -1", r"^\[blockwise_fp8\] health_freq = -1: must be a number of steps, or 0 for never"),
        ("health_freq = true", r"^\[blockwise_fp8\] health_freq = True: must be a number of steps"),
        ('health_freq = "often"', r"^\[blockwise_fp8\] health_freq = 'often': must be a number of steps"),
        ("cache_weight = 1", r"^\[blockwise_fp8\] cache_weight = 1: must be true or false"),
        ("fp8_all_gather = 'no'", r"^\[blockwise_fp8\] fp8_all_gather = 'no': must be true or false"),
        ("fuse = true", r"^\[blockwise_fp8\] fuse = True: must be one of 'auto', 'off'"),
        ("swiglu_inputs = 8", r"^\[blockwise_fp8\] swiglu_inputs = 8: must be one of 'bf16', 'fp8'"),
        ("ac_save = 'all'", r"^\[blockwise_fp8\] ac_save = 'all': must be one of 'gemm', 'balanced', 'none'"),
        ("rules_file = 3", r"^\[blockwise_fp8\] rules_file = 3: must be a path"),
        ("[blockwise_fp8.rules]\nmatch = '*'", r"^\[blockwise_fp8\] rules = .*must be an array of tables"),
        (
            "[[blockwise_fp8.rules]]\nmatch = '*'\n[[blockwise_fp8.rules]]\nmatsh = 'a'",
            r"^\[blockwise_fp8\] rule 2: unknown key 'matsh', did you mean 'match'",
        ),
        ("[[blockwise_fp8.rules]]\nmatch = 1", r"^\[blockwise_fp8\] rule 1: match = 1"),
        (
            "[[blockwise_fp8.rules]]\naction = 'skip'",
            r"^\[blockwise_fp8\] rule 1: match is missing or empty",
        ),
        ("gemm_backends = 'auto'", "Invalid field names .*gemm_backends"),
    ],
)
def test_a_bad_toml_is_named(read, section, message):
    with pytest.raises(ValueError, match=message):
        read(f'[job]\ncustom_config_module = "blockfp8_titan.config"\n[blockwise_fp8]\n{section}\n')


def test_a_rules_file_of_the_toml_is_not_read_where_the_command_line_names_another(read):
    text = TOML.replace('wgrad = "bf16"', 'rules_file = "no/such.toml"')
    assert len(read(text, "--blockwise_fp8.rules_file=skip_kv").blockwise_fp8.all_rules()) == 3
    with pytest.raises(ValueError, match=r"^\[blockwise_fp8\] rules_file = 'no/such.toml': no such file"):
        read(text).blockwise_fp8.all_rules()


def test_the_config_serialises(read):
    job_config = read(TOML)
    section = json.loads(json.dumps(job_config.to_dict()))["blockwise_fp8"]
    assert section["rules"][0]["match"] == "layers.*.attention.w[kv]"
    assert section["rules"][0]["wgrad"] is None


def test_help_shows_each_key_with_its_docstring(read, capsys):
    with pytest.raises(SystemExit):
        read(TOML, "--help")
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for part in (
        "--blockwise-fp8.fp8-all-gather {true,false} FSDP2 gathers",
        "--blockwise-fp8.cache-weight {true,false} Without FSDP2",
        "--blockwise-fp8.fuse {auto,off} Norms and feed-forwards",
        "--blockwise-fp8.ac-save {gemm,balanced,none} Which outputs",
        "--blockwise-fp8.wgrad {fp8,bf16,fp8_block} Weight gradient",
        "--blockwise-fp8.rules.0.match STR Glob on",
    ):
        assert part in text
