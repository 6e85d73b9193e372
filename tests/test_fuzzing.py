"""Five hundred of the fuzzer's inputs, that the fuzzer itself sees what it looks for, and records from any JSON."""

import json
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnsurgery.errors import BNSurgeryError, CheckpointError, shown
from bnsurgery.finetune import Config
from bnsurgery.records.record import SurgeryRecord
from bnsurgery.text.typed_json import loads, parse
from tests.fuzz.networks import CORPUS
from tests.fuzz.session import TIME, run
from tests.fuzz.targets import TARGETS, jobs

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
RECORD = json.loads((CORPUS / "record" / "torchvision").read_bytes())


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="the fuzzer reads memory from /proc")


@pytest.mark.slow
@needs_linux
def test_500_inputs(tmp_path):
    outcomes = list(run(jobs(500), seed=1, work=tmp_path, limit=3 * TIME))  # other tests run beside it
    assert len(outcomes) == len(jobs(500)) > 490
    assert [(o.job, o.finding) for o in outcomes if o.finding] == []
    taken = {o.job[0] for o in outcomes if o.taken}
    assert taken >= set(TARGETS) - {"recognise", "misbehaving"}  # the corpus holds sound files, or nothing was tried


@pytest.mark.slow
@needs_linux
def test_the_fuzzer_sees_what_it_looks_for(tmp_path):
    """Every kind of misbehaviour is in the corpus of a target made for this, and none hides the next."""
    names = sorted(path.name for path in (CORPUS / "misbehaving").iterdir())
    outcomes = list(run([("misbehaving", index) for index in range(len(names))], seed=0, work=tmp_path, limit=1.0))
    found = {name: (outcome.finding or "none").partition(":")[0] for name, outcome in zip(names, outcomes, strict=True)}
    assert found == {
        "call": "code", "code": "code", "crash": "crash", "exit": "traceback", "hang": "hang", "memory": "memory",
        "traceback": "traceback", "well": "none",
    }  # fmt: skip


@pytest.mark.slow
@needs_linux
def test_the_fuzzer_as_a_command(tmp_path):
    root = Path(__file__).resolve().parents[1]
    words = ["-m", "tests.fuzz", "--inputs", "2", "--targets", "misbehaving", "--findings", tmp_path / "f"]
    done = subprocess.run([sys.executable, *words], cwd=root, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "misbehaving-0-0: code: " in done.stdout
    assert (tmp_path / "f" / "misbehaving-0-0").read_bytes() == TARGETS["misbehaving"].corpus[0]


def test_inputs_depend_on_the_seed_alone():
    for target in TARGETS.values():
        corpus = target.corpus
        first, again, other = ([target.input(corpus, seed, 900 + i) for i in range(5)] for seed in (1, 1, 2))
        assert first == again
        assert first != other or len(corpus) == 1


@given(JSON)
def test_any_json_is_no_record(document):
    with pytest.raises(CheckpointError):
        SurgeryRecord.from_json(json.dumps(document))


@given(st.text())
def test_any_text_is_no_record(text):
    with pytest.raises(CheckpointError):
        SurgeryRecord.from_json(text)


@given(st.sampled_from(sorted(RECORD)), JSON)
def test_a_record_with_another_field_is_refused_or_comes_back(name, value):
    text = json.dumps({**RECORD, name: value})
    try:
        record = SurgeryRecord.from_json(text)
    except CheckpointError as error:
        assert len(str(error)) < 500
        assert str(error).isprintable()
    else:
        assert SurgeryRecord.from_json(record.to_json()) == record
        str(record)


@given(st.sampled_from([f.name for f in fields(Config)]), JSON)
def test_a_configuration_with_another_field_is_refused_or_comes_back(name, value):
    sound = asdict(Config(output="run"))
    made = []
    for make in (lambda: Config(**{**sound, name: value}), lambda: Config.from_dict({**sound, name: value}, "config")):
        try:
            made.append(make())
        except BNSurgeryError as error:
            assert name in str(error)
            assert str(error).isprintable()
    for config in made:
        assert Config.from_dict(asdict(config), "config") == config
        assert json.loads(json.dumps(asdict(config))) == asdict(config)


@given(st.dictionaries(st.text(), JSON))
def test_any_json_is_no_configuration(document):
    with pytest.raises(BNSurgeryError):
        Config.from_dict(document, "config")


TYPES = [
    str,
    int,
    float,
    bool,
    str | int,
    int | None,
    tuple[int, ...],
    dict[str, str | int],
    tuple[tuple[float, ...], ...],
]


@given(st.sampled_from(TYPES), JSON)
@settings(max_examples=300)
def test_what_parse_gives_is_of_the_type_it_was_asked_for(expected, value):
    try:
        found = parse(expected, value, "x")
    except CheckpointError as error:
        assert str(error).startswith("x")
        assert len(str(error)) < 500
    else:
        assert _conforms(found, expected)
        assert parse(expected, json.loads(json.dumps(found)), "x") == found or found != found or "nan" in str(found)


def _conforms(value, expected):
    origin, arguments = getattr(expected, "__origin__", None), getattr(expected, "__args__", ())
    if origin is tuple:
        return type(value) is tuple and all(_conforms(item, arguments[0]) for item in value)
    if origin is dict:
        return type(value) is dict and all(_conforms(item, arguments[1]) for item in value.values())
    if arguments:
        return any(_conforms(value, option) for option in arguments)
    return type(value) is expected


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a": ' * 5000,
        "9" * 5000,
        "NaN",
        "[Infinity]",
        "-Infinity",
        '{"a": 1, "a": 2}',
        '[{"x": {"b": 1, "b": 1}}]',
    ],
)
def test_json_that_could_be_taken_in_two_ways_is_no_json(text):
    with pytest.raises(ValueError):
        loads(text)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a", "'a'"),
        ("a" * 10**6, "'" + "a" * 100 + "...'"),
        ("\x1b[2J\n\udc80\u202e", r"'\x1b[2J\n\udc80\u202e'"),
        (10**5000, "a int"),
        (3, "3"),
        ([1] * 1000, "[1, " + "1, " * 32 + "..."),
    ],
    ids=["text", "long", "escape", "digits", "number", "list"],
)
def test_what_a_message_shows_is_short_and_printable(value, expected):
    assert shown(value) == expected


def test_a_value_nested_too_deeply_to_be_printed_is_shown_by_its_type():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(deep) == "a list"
    while deep:  # or taking it apart at once would recurse
        deep = deep[0]
