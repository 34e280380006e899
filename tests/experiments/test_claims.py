"""A claim is read strictly, judged by its record, and shown even when it fails."""

import contextlib
import dataclasses
import json
import pathlib
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest

import jmem
from experiments import claims
from experiments.harness import check, record, tables
from experiments.harness.claim import Claim, Claims, ClaimsError, Relation, read
from experiments.harness.run import Run
from jmem.memory.measure import hash_stablehlo
from jmem.program import Program
from jmem.targets import Target, resolve

ROOT = pathlib.Path(__file__).parents[2]
GIB = 2**30

PAPER = """
setting = "Ours keeps f32 moments."

[defaults]
kind = "compile"
source = "table 1"
preset = "small"

[[claim]]
name = "full"
what = "Small model, full"
paper = 59
program = "full"
relations = ["ours > 2 * lisa"]

[[claim]]
name = "lisa"
what = "Small model, LISA"
paper = 23
expect = 19.3
program = "lisa"
flags = ["--lisa.active-layers", "2"]
relations = ["ours <= paper", "ours within 2 % of expect"]

[[claim]]
name = "loss"
what = "Held-out loss falls"
kind = "train"
preset = ""
unit = "nats"
report = ["tables", "Methods", "lisa", "gain"]
relations = ["ours >= margin"]

[[claim]]
name = "phi2"
what = "Phi-2"
kind = "not-checkable"
paper = "28G"
confirmed = false
reason = "no such model"
"""

README = """# a

<!-- claims:begin -->

<!-- claims:end -->
<!-- methods:begin -->

<!-- methods:end -->

after
"""
FINETUNE = "<!-- choices:begin -->\n\n<!-- choices:end -->\n"


def a_repository(path: pathlib.Path, slug: str, paper: str) -> pathlib.Path:
    """One method with claims, and pages with markers."""
    for folder in (f"configs/{slug}", "docs"):
        (path / folder).mkdir(parents=True)
    (path / "configs" / slug / "claims.toml").write_text(paper)
    (path / "README.md").write_text(README)
    (path / "docs" / "finetune.md").write_text(FINETUNE)
    return path


@pytest.fixture
def root(tmp_path):
    return a_repository(tmp_path, "lisa", PAPER)


def claims_page(root: pathlib.Path) -> str:
    return (root / "docs" / "claims.md").read_text()


def a_record(claim: Claim, value: float, **changes) -> record.Record:
    fields = {
        "value": value,
        "definition": claim.definition,
        "programs": {"step": "0" * 64},
        "versions": {"jax": "0.12.0.1"},
        "device": "none",
        "commit": "abc",
        "date": "2026-01-02",
    }
    return record.Record(**fields | changes)


def measured(root, **values) -> tuple[Claims, dict[str, record.Record]]:
    """The claims with records of these values: GiB for memory, else as they are."""
    (found, _), *_ = tables.load(root)
    by_name = found.by_name
    records = {
        name: a_record(by_name[name], value * by_name[name].scale)
        for name, value in values.items()
    }
    record.save(found, records)
    return found, records


class TestReading:
    def test_defaults_hold_for_every_claim_that_does_not_say_otherwise(self, root):
        (found, _), *_ = tables.load(root)
        assert list(found.by_name) == ["full", "lisa", "loss", "phi2"]
        assert found.slug == "lisa"
        assert found.by_name["full"].kind == "compile"
        assert found.by_name["full"].preset == "small"
        assert found.by_name["loss"].preset == ""
        assert found.by_name["lisa"].flags == ("--lisa.active-layers", "2")

    @pytest.mark.parametrize(
        "old, new, line, message",
        [
            ('program = "full"', 'progam = "full"', 13, "did you mean 'program'"),
            ("expect = 19.3", 'expect = "19.3"', 20, "expect='19.3'"),
            ("expect = 19.3", "expect = true", 20, "expect=True"),
            ('kind = "train"', 'kind = "training"', 28, "did you mean 'train'"),
            ('kind = "compile"', 'knid = "compile"', 5, "did you mean 'kind'"),
            ("[defaults]", "[default]", 4, "did you mean 'defaults'"),
            ('"ours > 2 * lisa"', '"ours > 2 * lisaa"', 14, "did you mean 'lisa'"),
            ('"ours > 2 * lisa"', '"ours is small"', 14, "not a relation"),
            ('"ours > 2 * lisa"', '"ours > expect"', 14, "'expect' to be a number"),
            ('"ours >= margin"', '"ours >= lisa"', 32, "compares nats with GiB"),
            ('name = "lisa"', 'name = "full"', 17, "'full' is used twice"),
            ('program = "full"', "", 10, "needs 'program'"),
            ('reason = "no such model"', "", 35, "needs 'reason'"),
            ('unit = "nats"', 'program = "x"', 30, "says nothing about"),
            ("paper = 59", 'unit = "nats"', 12, "unit of memory 'nats'"),
            ("paper = 59", "paper = ", 12, "line 12"),
            ("[defaults]", "[[defaults]]", 4, "write setting"),
            ('kind = "train"', 'kind = ["train"]', 28, r"unknown kind \['train'\]"),
            ('kind = "train"', "kind = {a = 1}", 28, "unknown kind {'a': 1}"),
            ('name = "lisa"', "name = [1]", 17, r"name=\[1\] should be str"),
        ],
    )
    def test_a_mistake_is_named_with_its_line(self, root, old, new, line, message):
        path = root / "configs" / "lisa" / "claims.toml"
        path.write_text(PAPER.replace(old, new, 1))
        with pytest.raises(ClaimsError, match=message) as caught:
            read(path)
        assert f"claims.toml:{line}:" in str(caught.value) or "line 12" in message


def test_claims_that_are_not_utf8_are_refused_by_name(tmp_path):
    path = tmp_path / "claims.toml"
    path.write_bytes(PAPER.encode() + b"# \xe9\n")
    with pytest.raises(ClaimsError, match=r"claims\.toml: 'utf-8' codec"):
        read(path)


def test_the_claims_of_the_contributors_page_are_read(tmp_path):
    page = (ROOT / "docs" / "contributing.md").read_text()
    (sample,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    root = a_repository(tmp_path, "spacing", sample)
    assert set(read(root / "configs/spacing/claims.toml").by_name) == {
        *("smollm2-cache", "needles")
    }


class TestRelation:
    @pytest.mark.parametrize(
        "text, holds",
        [
            ("ours < 20", True),
            ("ours <= 19.5", True),
            ("ours > 19.5", False),
            ("ours >= paper", False),
            ("ours < 0.5 * full", True),
            ("3 * ours < full", False),
            ("ours within 2 % of 19.2", True),
            ("ours within 1 % of 19.2", False),
            ("ours < other", None),
        ],
    )
    def test_it_compares_what_it_names(self, text, holds):
        values = {"ours": 19.5, "paper": 23.0, "full": 40.0, "other": None}
        relation = Relation.parse(text)
        numbers = set(values) & set(relation.names)
        assert (
            relation.holds(lambda n: values[n] if n in numbers else float(n)) is holds
        )

    @pytest.mark.parametrize("text", ["", "ours", "ours == 3", "< 3", "ours < 3 < 4"])
    def test_it_refuses_what_it_cannot_read(self, text):
        with pytest.raises(ValueError, match="not a relation"):
            Relation.parse(text)


class TestVerdict:
    def test_it_holds_when_all_relations_do(self, root):
        found, records = measured(root, lisa=19.2, full=75.7)
        assert tables.judge(found.by_name["lisa"], found, records) == "holds"
        assert tables.judge(found.by_name["full"], found, records) == "holds"

    def test_it_names_the_relation_that_fails(self, root):
        found, records = measured(root, lisa=24.0)
        words = tables.judge(found.by_name["lisa"], found, records)
        assert words.startswith("**fails**")
        assert "`ours <= paper`" in words

    def test_it_waits_for_the_number_of_another_claim_or_a_margin(self, root):
        found, records = measured(root, full=75.7, loss=0.2)
        assert "open" in tables.judge(found.by_name["full"], found, records)
        assert "open" in tables.judge(found.by_name["loss"], found, records)

    def test_a_margin_is_a_bar(self, root):
        found, records = measured(root, loss=0.2)
        for margin, word in ((0.1, "holds"), (0.3, "**fails**")):
            claim = dataclasses.replace(found.by_name["loss"], margin=margin)
            assert tables.judge(claim, found, records).startswith(word)

    def test_a_number_of_another_program_is_stale(self, root):
        found, records = measured(root, lisa=19.2, full=75.7)
        edited = dataclasses.replace(found.by_name["lisa"], flags=())
        found.by_name["lisa"] = edited
        assert "stale" in tables.judge(edited, found, records)
        assert "open" in tables.judge(found.by_name["full"], found, records)

    def test_it_says_what_is_not_measured_and_what_cannot_be(self, root):
        found, records = measured(root)
        assert tables.judge(found.by_name["lisa"], found, records) == "not measured"
        words = tables.judge(found.by_name["phi2"], found, records)
        assert words == "not checkable: no such model"


class TestTables:
    def test_a_row_has_the_papers_number_ours_and_how_it_was_measured(self, root):
        found, records = measured(root, lisa=19.2)
        row = next(
            r for r in tables.format_table(found, records).splitlines() if "LISA" in r
        )
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells == [
            "Small model, LISA",
            "23 GiB (table 1)",
            "19.3 GiB",
            "19.20 GiB",
            "`ours <= paper`, `ours within 2 % of expect`",
            "holds",
            "compiled for h200, jax 0.12.0.1, 2026-01-02",
        ]

    @pytest.mark.parametrize(
        ("doubt", "words"),
        [
            ({"moved": "2026-02-03"}, "2026-01-02, of an earlier program |"),
            ({"programs": None}, "2026-01-02, program not noted |"),
        ],
    )
    def test_a_number_of_another_program_or_none_is_marked(self, root, doubt, words):
        found, records = measured(root, lisa=19.2)
        records["lisa"] = dataclasses.replace(records["lisa"], **doubt)
        assert words in tables.format_table(found, records)

    def test_an_interval_is_shown_where_its_ends_differ(self, root):
        found, records = measured(root, lisa=19.2)
        bounds = (int(19.1 * GIB), int(19.25 * GIB))
        records["lisa"] = dataclasses.replace(records["lisa"], interval=bounds)
        assert "19.20 GiB (19.10 to 19.25)" in tables.format_table(found, records)

    def test_an_unconfirmed_number_of_the_paper_is_marked(self, root):
        found, records = measured(root)
        assert "28G (table 1, unconfirmed)" in tables.format_table(found, records)

    def test_the_page_begins_with_counts_and_with_what_fails(self, root):
        measured(root, lisa=24.0, full=75.7)
        text = tables.format_page(tables.load(root))
        counted, failing, rest = text.split("\n\n## ")
        assert "| [lisa](#lisa) | 4 | 1 | 1 | 0 | 0 | 1 | 1 |" in counted
        assert failing.startswith("The 1 that fail")
        assert "| lisa | Small model, LISA | 24.00 GiB | `ours <= paper`, " in failing
        assert rest.startswith("lisa\n\nOurs keeps f32 moments.\n\n| claim |")

    def test_the_readme_counts_what_fails_by_method(self, root):
        measured(root, lisa=24.0, full=75.7)
        words = tables.summarise(tables.load(root)).replace("\n", " ")
        assert words.startswith(
            "Of 4 claims, 1 hold, 1 fail (lisa 1), 0 open, 0 stale, 1 not measured and"
            " 1 not checkable. 0 numbers are of an earlier program"
        )
        assert "[docs/claims.md](docs/claims.md)" in words


class TestChoices:
    """Which method for my card: rows of docs/finetune.md that come from records."""

    def test_rows_are_by_model_and_bytes_and_name_the_cards_with_room(self, root):
        path = root / "configs" / "lisa" / "claims.toml"
        for name, method in (("lisa", "LISA"), ("full", "everything")):
            text = path.read_text()
            head = f'name = "{name}"\n'
            assert head in text
            more = f'{head}choice = ["7B", "{method}", "all"]\n'
            path.write_text(text.replace(head, more))
        measured(root, lisa=20.0, full=59.0)
        lines = tables.format_choices(tables.load(root)).splitlines()
        assert lines[2:] == [
            "| 7B | LISA | all | 20.0 GiB | 24 GB, 48 GB, 80 GB, 141 GB |",
            "| 7B | everything | all | 59.0 GiB | 80 GB, 141 GB |",
        ]

    def test_the_room_is_that_of_the_targets(self):
        cards = dict(zip(tables.ROOM, ("rtx4090", "a6000", "h100", "h200")))
        for card, name in cards.items():
            room = resolve(name).usable_bytes / 2**30 - 1  # the default reserve
            assert round(room, 1) == tables.ROOM[card]


class TestCheck:
    """`--check` compares files and nothing else."""

    def test_it_passes_on_what_table_wrote_and_keeps_the_rest_of_the_readme(self, root):
        measured(root, lisa=19.2)
        assert claims.main(claims.Command(check=True), root) == 1
        assert claims.main(claims.Command(table=True), root) == 0
        assert claims.main(claims.Command(check=True), root) == 0
        readme = (root / "README.md").read_text()
        assert readme.startswith("# a\n")
        assert readme.endswith("\nafter\n")
        assert "Of 4 claims, 1 hold" in readme
        assert "19.20 GiB" in claims_page(root)

    def test_it_sees_a_record_that_moved(self, root, capsys):
        measured(root, lisa=19.2)
        claims.main(claims.Command(table=True), root)
        measured(root, lisa=19.3)
        assert claims.main(claims.Command(check=True), root) == 1
        out = capsys.readouterr().out
        assert "docs/claims.md differs" in out
        assert "--table" in out

    def test_it_sees_a_table_edited_by_hand(self, root):
        measured(root, lisa=24.0)
        claims.main(claims.Command(table=True), root)
        page = root / "docs" / "claims.md"
        page.write_text(page.read_text().replace("**fails**", "holds"))
        assert claims.main(claims.Command(check=True), root) == 1

    def test_it_sees_a_record_without_a_claim_and_table_drops_it(self, root, capsys):
        measured(root, lisa=19.2)
        claims.main(claims.Command(table=True), root)
        path = root / "configs" / "lisa" / "records.json"
        kept = json.loads(path.read_text())
        path.write_text(json.dumps(kept | {"gone": kept["lisa"]}))
        assert claims.main(claims.Command(check=True), root) == 1
        assert "'gone'" in capsys.readouterr().out
        claims.main(claims.Command(table=True), root)
        assert claims.main(claims.Command(check=True), root) == 0
        assert json.loads(path.read_text()) == kept

    @pytest.mark.parametrize(
        ("file", "name"), [("README.md", "claims"), ("docs/finetune.md", "choices")]
    )
    def test_a_page_without_markers_is_refused(self, root, file, name):
        (root / file).write_text("# a\n")
        message = f"{pathlib.Path(file).name} has lost .*{name}:begin"
        with pytest.raises(ClaimsError, match=message):
            claims.main(claims.Command(table=True), root)


class TestRecords:
    def test_they_come_back_as_they_were_written(self, root):
        found, records = measured(root, lisa=19.2, loss=0.125)
        records["lisa"] = dataclasses.replace(records["lisa"], interval=(1, 2))
        record.save(found, records)
        assert record.load(found.path.with_name("records.json")) == records

    @pytest.mark.parametrize("text", ["[]", "{", '{"lisa": {"valeu": 3}}', '{"a": 1}'])
    def test_a_damaged_file_is_refused_by_name(self, root, text):
        path = root / "configs" / "lisa" / "records.json"
        path.write_text(text)
        with pytest.raises(ClaimsError, match=r"records\.json"):
            record.load(path)

    @pytest.mark.parametrize(
        "change",
        [
            *({"value": "3"}, {"value": True}, {"value": None}, {"interval": [1]}),
            *({"interval": [1, "2"]}, {"versions": []}, {"versions": {"jax": 1}}),
            *({"versions": {}}, {"programs": {"a": 1}}, {"date": 3}, {"config": {}}),
        ],
        ids=str,
    )
    def test_a_value_of_another_kind_is_refused_by_name(self, root, change):
        measured(root, lisa=19.2)
        path = root / "configs" / "lisa" / "records.json"
        kept = json.loads(path.read_text())
        path.write_text(json.dumps({"lisa": kept["lisa"] | change}))
        (field,) = change
        with pytest.raises(ClaimsError, match=rf"records\.json: .* lisa: {field}="):
            record.load(path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig:
    side: int = 1024
    """Rows and columns of the array."""
    gpu: str = "h200"


def toy_programs(config: ToyConfig, target: Target) -> dict[str, Program]:
    x = jax.ShapeDtypeStruct((config.side, config.side), jnp.float32)
    return {"add": Program(lambda x: x + 1, (x,))}


TOY = """
[defaults]
kind = "compile"
source = "closed form"
unit = "MiB"
program = "add"
relations = ["ours within 0.1 % of expect"]

[[claim]]
name = "add"
what = "Argument and result"
expect = 8

[[claim]]
name = "small"
what = "The same, a quarter"
flags = ["--side", "512"]
expect = 2

[[claim]]
name = "gain"
what = "The loss falls"
kind = "train"
program = ""
unit = "nats"
report = ["tables", "Methods", "lisa", "gain"]
relations = ["ours >= margin"]
margin = 0.2
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A repository whose one method has an experiment that really compiles."""
    module = types.ModuleType("experiments.toy")
    vars(module).update(Config=ToyConfig, programs=toy_programs)
    monkeypatch.setitem(sys.modules, "experiments.toy", module)
    return a_repository(tmp_path, "toy", TOY)


def hash_toy() -> dict[str, str]:
    """Of the toy experiment's program, by name."""
    target = resolve("h200")
    programs = toy_programs(ToyConfig(), target)
    return {n: hash_stablehlo(p.lower(target).as_text()) for n, p in programs.items()}


def change(monkeypatch) -> None:
    """Gives the toy experiment, and its check, another program."""
    x = jax.ShapeDtypeStruct((4,), jnp.float32)
    other = {"add": Program(lambda x: x + 2, (x,))}
    for module in ("experiments.toy", "experiments.toy_check"):
        if module in sys.modules:
            changed = lambda *given: other  # noqa: E731
            monkeypatch.setattr(sys.modules[module], "programs", changed)


def toy_records(root) -> dict[str, record.Record]:
    return record.load(root / "configs" / "toy" / "records.json")


class TestMeasuring:
    def test_it_compiles_records_and_judges(self, toy):
        assert claims.main(claims.Command(), toy) == 0
        found = toy_records(toy)
        assert set(found) == {"add", "small"}
        assert found["add"].value == 2 * 1024 * 1024 * 4
        assert found["small"].value == 2 * 512 * 512 * 4
        assert found["add"].versions["jax"] == jax.__version__
        assert found["add"].interval == (2**23, 2**23)
        assert [len(text) for text in (found["add"].programs or {}).values()] == [64]
        assert claims.main(claims.Command(check=True), toy) == 0
        rows = tables.format_table(*tables.load(toy)[0]).splitlines()[2:]
        assert [row.split(" | ")[5] for row in rows] == [
            "holds",
            "holds",
            "not measured",
        ]

    def test_missing_leaves_what_is_current_alone(self, toy):
        claims.main(claims.Command(only=("toy/add",)), toy)
        first = dataclasses.replace(toy_records(toy)["add"], date="2000-01-01")
        record.save(tables.load(toy)[0][0], {"add": first})
        claims.main(claims.Command(missing=True), toy)
        assert toy_records(toy)["add"] == first
        assert "small" in toy_records(toy)

    def test_stale_lists_programs_that_changed(self, toy, monkeypatch, capsys):
        claims.main(claims.Command(only=("toy/add",)), toy)
        assert claims.main(claims.Command(stale=True), toy) == 0
        change(monkeypatch)
        assert claims.main(claims.Command(stale=True, only=("lisa/*",)), toy) == 0
        assert claims.main(claims.Command(stale=True), toy) == 1
        assert "toy/add: its program changed" in capsys.readouterr().out
        assert "of an earlier program |" in claims_page(toy)
        assert claims.main(claims.Command(check=True), toy) == 0
        monkeypatch.setattr(sys.modules["experiments.toy"], "programs", toy_programs)
        assert claims.main(claims.Command(stale=True), toy) == 0
        assert "of an earlier program |" not in claims_page(toy)

    def test_stale_says_when_another_jax_cannot_tell(self, toy, capsys):
        claims.main(claims.Command(only=("toy/add",)), toy)
        old = dataclasses.replace(toy_records(toy)["add"], versions={"jax": "0.1"})
        record.save(tables.load(toy)[0][0], {"add": old})
        assert claims.main(claims.Command(stale=True), toy) == 1
        assert "recorded under jax 0.1" in capsys.readouterr().out

    @pytest.mark.parametrize(
        "old, new, message",
        [
            ('program = "add"', 'program = "ad"', "no program 'ad'.*'add'"),
            ('"--side", "512"', '"--sides", "512"', "no flags --sides 512"),
            ("expect = 8", 'quantity = "devise"\nexpect = 8', "quantity='devise'"),
            (
                "expect = 8",
                'quantity = "by_label/cache"\nexpect = 8',
                "quantity='by_label/cache' is no number",
            ),
        ],
    )
    def test_a_claim_the_experiment_cannot_answer_is_refused(
        self, toy, old, new, message
    ):
        path = toy / "configs" / "toy" / "claims.toml"
        path.write_text(TOY.replace(old, new, 1))
        with pytest.raises(ClaimsError, match=message):
            claims.main(claims.Command(), toy)

    def test_a_part_of_a_field_is_a_quantity(self, toy, monkeypatch):
        labelled = lambda config, target: {  # noqa: E731
            name: dataclasses.replace(program, labels={"the array": (0, "")})
            for name, program in toy_programs(config, target).items()
        }
        monkeypatch.setattr(sys.modules["experiments.toy"], "programs", labelled)
        path = toy / "configs" / "toy" / "claims.toml"
        part = 'quantity = "by_label/the array"\nexpect = 4'
        path.write_text(TOY.replace("expect = 8", part, 1))
        assert claims.main(claims.Command(only=("toy/add",)), toy) == 0
        found = toy_records(toy)["add"]
        assert found.value == 1024 * 1024 * 4
        assert found.interval is None

    def test_only_refuses_a_name_that_is_none(self, toy):
        with pytest.raises(ClaimsError, match="--only toy/none"):
            claims.main(claims.Command(only=("toy/none",)), toy)


class TestRuns:
    """`--from-run` believes complete runs of the claimed config only."""

    def a_run(
        self, root, side=1024, gain: object = 0.25, fails=False, measures=False
    ) -> pathlib.Path:
        run = Run("toy", ToyConfig(side=side), runs=root / "runs")
        with contextlib.suppress(ZeroDivisionError), run:
            run.table("Methods", ["method", "gain"], [["lisa", gain]])
            if measures:
                program = toy_programs(run.config, resolve("h200"))["add"]
                run.record(jmem.measure(program, target="h200", bounds=False), "add")
            if fails:
                assert run.folder.is_dir()
                raise ZeroDivisionError
        return run.folder

    def test_it_takes_the_number_up(self, toy):
        run = self.a_run(toy)
        assert claims.main(claims.Command(from_run=run), toy) == 0
        found = toy_records(toy)["gain"]
        assert found.value == 0.25
        assert found.device == "cpu"
        assert "| holds |" in claims_page(toy)

    def test_a_run_answers_the_claims_about_its_own_config_only(self, toy):
        path = toy / "configs" / "toy" / "claims.toml"
        other = TOY[TOY.rindex("[[claim]]") :].replace('"gain"', '"gain-8"', 1)
        path.write_text(TOY + other + 'flags = ["--side", "8"]\n')
        claims.main(claims.Command(from_run=self.a_run(toy)), toy)
        assert set(toy_records(toy)) == {"gain"}
        claims.main(claims.Command(from_run=self.a_run(toy, side=8)), toy)
        assert set(toy_records(toy)) == {"gain", "gain-8"}

    def test_a_run_that_noted_its_programs_is_compared(self, toy, monkeypatch, capsys):
        run = self.a_run(toy, measures=True)
        claims.main(claims.Command(from_run=run), toy)
        assert "program not noted" not in claims_page(toy)
        assert claims.main(claims.Command(stale=True), toy) == 0
        change(monkeypatch)
        assert claims.main(claims.Command(stale=True), toy) == 1
        assert "toy/gain: its program changed since" in capsys.readouterr().out
        assert "of an earlier program |" in claims_page(toy)

    def test_one_that_noted_none_is_told_and_counted_but_does_not_fail(
        self, toy, capsys
    ):
        claims.main(claims.Command(from_run=self.a_run(toy)), toy)
        assert "program not noted" in claims_page(toy)
        assert claims.main(claims.Command(stale=True), toy) == 0
        out = capsys.readouterr().out
        assert "1 of kind train: its program was not noted" in out

    def test_a_gain_below_the_margin_is_shown_as_a_failure(self, toy):
        claims.main(claims.Command(from_run=self.a_run(toy, gain=0.1)), toy)
        assert "**fails**: `ours >= margin`" in claims_page(toy)
        assert "1 fail (toy 1)" in (toy / "README.md").read_text()

    def test_it_refuses_other_configs_unfinished_runs_and_missing_numbers(self, toy):
        def refused(run, message):
            with pytest.raises(ClaimsError, match=message):
                claims.main(claims.Command(from_run=run), toy)
            assert toy_records(toy) == {}

        refused(self.a_run(toy, side=8), "side=8, but toy/gain .* side=1024")
        refused(self.a_run(toy, fails=True), "the run is failed")
        refused(self.a_run(toy, gain="much"), "'much', no number")
        refused(toy / "runs", "no report there")
        path = toy / "configs" / "toy" / "claims.toml"
        path.write_text(TOY.replace('"gain"]', '"loss"]'))
        refused(self.a_run(toy), "no 'loss' of tables/Methods/lisa/loss; .* 'gain'")


LIVE = """
[[claim]]
name = "peak"
what = "The peak on a card"
kind = "live"
program = ""
source = "prediction"
experiment = "toy_check"
report = ["cases", "add", "peak_bytes"]
relations = ["ours within 3 % of expect"]
expect = 8
"""


class TestChecks:
    """`--from-run FILE` believes complete checks by the defaults."""

    @pytest.fixture
    def live(self, toy, monkeypatch):
        module = types.ModuleType("experiments.toy_check")
        vars(module).update(
            settings=lambda: {"side": 1024},
            programs=lambda row, target, config: toy_programs(ToyConfig(), target),
        )
        monkeypatch.setitem(sys.modules, "experiments.toy_check", module)
        path = toy / "configs" / "toy" / "claims.toml"
        path.write_text(path.read_text() + LIVE)
        return toy

    def a_check(self, root, *, case="add", side=1024, complete=True):
        path = root / "runs" / "check.json"
        probed = {"device": "NVIDIA H200", "versions": {"jax": jax.__version__}}
        (hashed,) = hash_toy().values()
        row = {"peak_bytes": 8 * 2**20 + 1, "programs": {"add": hashed}}
        cases = {case: row}
        config = {"side": side}
        check.write(path, "toy_check", probed, config, complete, cases=cases)
        return path

    def test_it_takes_the_number_up_with_its_card(self, live):
        assert claims.main(claims.Command(from_run=self.a_check(live)), live) == 0
        found = toy_records(live)["peak"]
        assert found.value == 8 * 2**20 + 1
        assert found.device == "NVIDIA H200"
        assert found.programs == hash_toy()
        words = f"| holds | NVIDIA H200, jax {jax.__version__}, "
        assert words in claims_page(live)

    def test_its_program_is_compared_without_the_card(self, live, monkeypatch, capsys):
        claims.main(claims.Command(from_run=self.a_check(live)), live)
        assert claims.main(claims.Command(stale=True), live) == 0
        change(monkeypatch)
        assert claims.main(claims.Command(stale=True), live) == 1
        assert "toy/peak: its program changed since" in capsys.readouterr().out
        assert "of an earlier program |" in claims_page(live)

    def test_rows_that_were_not_asked_for_are_left_as_they_are(self, live):
        claims.main(claims.Command(from_run=self.a_check(live)), live)
        before = toy_records(live)
        claims.main(claims.Command(from_run=self.a_check(live, case="other")), live)
        assert toy_records(live) == before

    @pytest.mark.parametrize(
        "how, message",
        [
            ({"side": 8}, '"side": 8.*peak is about {"side": 1024}'),
            ({"complete": False}, "is running"),
        ],
    )
    def test_other_sizes_and_unfinished_checks_are_refused(self, live, how, message):
        path = self.a_check(live, **how)
        with pytest.raises(ClaimsError, match=message):
            claims.main(claims.Command(from_run=path), live)
        assert toy_records(live) == {}

    def test_a_check_that_no_claim_asks_for_is_refused(self, toy):
        with pytest.raises(ClaimsError, match="no claim of kind 'live' asks"):
            claims.main(claims.Command(from_run=self.a_check(toy)), toy)


CLAIMS = {found.slug: (found, records) for found, records in tables.load(ROOT)}


class TestThisRepository:
    def test_the_tables_equal_the_records_and_looking_costs_no_jax(self):
        code = (
            "import sys, time; start = time.perf_counter()\n"
            "from experiments import claims\n"
            "status = claims.main(claims.Command(check=True))\n"
            "assert 'jax' not in sys.modules, 'jax was imported'\n"
            "assert time.perf_counter() - start < 1, 'slower than a second'\n"
            "sys.exit(status)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr

    @pytest.mark.parametrize("slug", CLAIMS)
    def test_a_cheap_claim_comes_out_as_recorded(self, slug):
        """Within 3 %: JAX's versions differ by less, a method gone wrong by more."""
        found, records = CLAIMS[slug]
        (cheap,) = (claim for claim in found.by_name.values() if claim.cheap)
        again = record.measure(slug, cheap, bounds=False)
        assert again.value == pytest.approx(records[cheap.name].value, rel=0.03)

    @pytest.mark.parametrize("slug", CLAIMS)
    def test_every_compiled_claim_has_been_measured_as_it_stands(self, slug):
        found, records = CLAIMS[slug]
        for claim in found.by_name.values():
            if claim.kind == "compile":
                assert records[claim.name].definition == claim.definition
