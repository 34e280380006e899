"""What strangers wrote has so much time and memory, and the next request is served."""

import json
import os
import threading

import pytest
from checkpoints import tiny

from jmem import confined
from jmem.checkpoints import CheckpointError
from jmem.checkpoints.tokenizer import from_json
from jmem.confined import ConfinedError, ask


def render(source, **more):
    request = {"tokens": {}, "messages": [], "parts": [[0, False]], "tools": None}
    request |= {"today": "", "limit": 1000, "source": source}
    return ask("render", **(request | more))


def test_a_failure_is_told_and_the_process_stays():
    (first,) = render("{{ 1 + 1 }}")
    with pytest.raises(ConfinedError, match=r"^ZeroDivisionError: "):
        render("{{ 1 / (1 - 1) }}")
    assert first == "2"


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
        "{% endfor %}",
        "{% for i in messages %}{{ 9 ** (9 ** 9) }}{% endfor %}",
        "{% for i in messages %}{{ 'a' * 10 ** 11 }}{% endfor %}",
        "{% set x = namespace(v='a') %}{% for i in range(99) %}"
        "{% set x.v = x.v ~ x.v %}{% endfor %}",
        "{{ '%*d' % (10 ** 10, 1) }}",
        "{{ 'a'.rjust(10 ** 10) }}",
    ],
)
def test_limits_end_a_program(source, monkeypatch):
    monkeypatch.setattr(confined, "SECONDS", 0.5)
    with pytest.raises(
        ConfinedError, match=r"more than 0\.5 s|MiB|MemoryError|Overflow"
    ):
        render(source, messages=[0], parts=[[1, False]])
    assert render("{{ 3 }}") == ["3"]


def test_constants_are_folded_in_the_child_too(monkeypatch):
    monkeypatch.setattr(confined, "SECONDS", 0.5)
    with pytest.raises(ConfinedError):
        ask("compile", source="{{ 9 ** (9 ** 9) }}")


def test_the_limit_is_one_requests_and_not_all_requests(monkeypatch):
    monkeypatch.setattr(confined, "SECONDS", 0.5)
    source = "{% for i in range(99999) %}{% endfor %}"
    for _ in range(30):
        assert render(source) == [""]


def test_requests_of_threads_get_their_own_answers():
    found = {}

    def one(number):
        found[number] = [render(f"{{{{ {number} }}}}")[0] for _ in range(5)]

    threads = [threading.Thread(target=one, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: [str(i)] * 5 for i in range(4)}


def test_the_child_has_none_of_the_callers_environment(monkeypatch):
    monkeypatch.setenv("A_SECRET", "7")
    raw = json.dumps(confined.make_environment())
    assert "A_SECRET" not in raw
    assert os.environ["PATH"] in confined.make_environment().values()


def test_what_is_not_json_is_refused_before_it_is_sent():
    with pytest.raises(ConfinedError, match=r"not JSON: .*bytes"):
        render("{{ 1 }}", messages=[b"a"])
    assert render("{{ 1 }}") == ["1"]


EXPLOSIVE = {
    "growth": {
        "type": "Sequence",
        "normalizers": [
            {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaa"}
        ]
        * 12,
    },
    "pattern": {
        "type": "Replace",
        "pattern": {"Regex": "([ -~]+)*[^ -~]{4}"},
        "content": "",
    },
}


def test_a_tokenizer_that_would_explode_at_some_text_is_refused_too(tmp_path):
    """At a letter that trying it out does not show."""
    rule = {"type": "Replace", "pattern": {"String": "\u2603"}, "content": "\u2603" * 8}
    path = tmp_path / "tokenizer.json"
    raw = json.loads(tiny.tiny_tokenizer().to_str())
    for count, refused in ((3, False), (12, True)):
        growing = {"type": "Sequence", "normalizers": [rule] * count}
        path.write_text(json.dumps(raw | {"normalizer": growing}))
        if refused:
            with pytest.raises(CheckpointError, match=r"text 6\.87e\+10 times as long"):
                from_json(path, 48)
        else:
            assert from_json(path, 48).encode("\u2603").tokens == ["<unk>"]


@pytest.mark.parametrize("normalizer", EXPLOSIVE.values(), ids=EXPLOSIVE)
def test_a_tokenizer_that_explodes_is_refused_by_name(
    normalizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(confined, "SECONDS", 1.0)
    path = tmp_path / "tokenizer.json"
    raw = json.loads(tiny.tiny_tokenizer().to_str()) | {"normalizer": normalizer}
    path.write_text(json.dumps(raw))
    message = (
        r"tokenizer\.json: not a tokenizer that can be used \(.*(more than|Error|Ex)"
    )
    with pytest.raises(CheckpointError, match=message):
        from_json(path, 48)
