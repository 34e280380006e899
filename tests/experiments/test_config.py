"""Settings: read from TOML and from flags, written so that they come back."""

import dataclasses
import pathlib
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_experiment import Adam, Config, Lisa

from experiments.harness import cli, config
from experiments.harness.config import ConfigError

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def presets(tmp_path, monkeypatch):
    """A checkout with `configs/toy/` to write presets in."""
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    folder = tmp_path / "configs" / "toy"
    folder.mkdir(parents=True)
    (folder / "small.toml").write_text("[lisa]\nactive_layers = 1\n")
    (folder / "claims.toml").write_text("")
    return folder


def parse(*arguments):
    return cli.parse(Config, "toy", arguments)[1]


texts = st.text(st.characters(exclude_categories=["Cs"]))
floats = st.floats(allow_nan=False)
configs = st.builds(
    Config,
    lisa=st.builds(
        Lisa,
        active_layers=st.integers(0, 2**70),
        weights=st.lists(floats).map(tuple),
        adam=st.builds(
            Adam,
            learning_rate=floats,
            schedule=st.sampled_from(["constant", "cosine"]),
        ),
    ),
    only=st.lists(texts).map(tuple),
    shape=st.tuples(st.integers(), st.integers()),
    shuffle=st.booleans(),
    data=st.text("abc/. é", min_size=1).map(pathlib.Path),
    note=texts,
    chunk=st.none() | st.integers(),
    schedule=st.none() | st.sampled_from(["constant", "cosine"]),
    gpu=texts,
)


class TestToml:
    @given(configs)
    @settings(deadline=None)
    def test_what_is_written_is_read_back_equal(self, tmp_path_factory, value):
        path = tmp_path_factory.mktemp("config") / "config.toml"
        path.write_bytes(config.write(value).encode())
        assert config.read(path, Config()) == value

    def test_a_nested_table_keeps_the_defaults_its_parent_gives(self, tmp_path):
        path = tmp_path / "p.toml"
        path.write_text("[lisa.adam]\nlearning_rate = 1\n")
        read = config.read(path, Config())
        assert read == Config(lisa=Lisa(active_layers=3, adam=Adam(learning_rate=1.0)))
        assert type(read.lisa.adam.learning_rate) is float

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            (
                "\n# paper, table 1\n[lisa]\nactive_layer_num = 2\n",
                ":4: unknown key 'active_layer_num'; did you mean 'active_layers'?",
            ),
            (f"gpu = {'[' * 10_000}", ":1: not TOML"),
            (f"seq_len = {'9' * 5000}", ":1: not TOML"),
            ("gpus = 'h100'\n", ":1: unknown key 'gpus'; did you mean 'gpu'?"),
            (
                "note = '''\nx\n'''\nlearning_rate = 1.0\n",
                ":4: unknown key 'learning_rate'; "
                "did you mean 'lisa.adam.learning_rate'?",
            ),
            ("zzzz = 1", ":1: unknown key 'zzzz'; known: lisa, only, shape"),
            ("[lisa]\n\nactive_layers = 2.0", ":3: active_layers=2.0 must be an int"),
            ("shuffle = 1", ":1: shuffle=1 must be true or false."),
            ("gpu = 1", ":1: gpu=1 must be a string."),
            ("\nchunk = 'none'", ":2: chunk='none' must be an integer."),
            ("schedule = 'cosin'", ":1: schedule='cosin' is none of ('constant', "),
            ("only = 'full'", ":1: only='full' must be an array, each a string."),
            ("only = ['a', 2]", ":1: only[1]=2 must be a string."),
            ("shape = [1, 2, 3]", ":1: shape=[1, 2, 3] must be an array of 2 entries"),
            (
                "lisa.adam.schedule = 'cosin'",
                ":1: schedule='cosin' is none of ('constant', 'cosine'); "
                "did you mean 'cosine'?",
            ),
            ("lisa = 3", ":1: lisa=3 must be a table: write lisa.KEY = ..."),
            (
                "[lisa]\nweights = [1]\nactive_layers = -1",
                ":3: Lisa: active_layers=-1 must not be negative.",
            ),
            ("gpu = 'h200'\nnote = ", ":2: not TOML: Invalid value."),
            ("gpu = 'a'\ngpu = 'b'", ":2: not TOML: Cannot overwrite a value."),
        ],
    )
    def test_refusals_name_file_line_and_rule(self, tmp_path, text, words):
        path = tmp_path / "p.toml"
        path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            config.read(path, Config())
        assert str(caught.value).startswith(f"{path}{words}")

    def test_a_file_that_is_no_text(self, tmp_path):
        path = tmp_path / "p.toml"
        path.write_bytes(b"\xff\xfe")
        with pytest.raises(ConfigError, match="cannot be read"):
            config.read(path, Config())

    def test_lines_of_keys(self):
        text = 'a = [\n 1,\n]\n\n# why\nb.c = """\n[d]\n"""\n[e]\nf = 1\n'
        lines = config.locate(text)
        assert lines == {("a",): 1, ("b",): 6, ("b", "c"): 6, ("e",): 9, ("e", "f"): 10}

    @pytest.mark.parametrize(
        "hint", [int | str, int | str | None, dict | None, list[int], tuple[Adam, ...]]
    )
    def test_a_field_of_another_type_cannot_be_in_a_config(self, hint):
        bad = dataclasses.make_dataclass("Bad", [("field", hint, None)], frozen=True)
        with pytest.raises(TypeError, match=r"Bad\.field: .* is no type of a config's"):
            config.check(bad)

    def test_a_config_must_be_frozen(self):
        bad = dataclasses.make_dataclass("Bad", [("field", int, 0)])
        with pytest.raises(TypeError, match="must be a frozen dataclass"):
            config.check(bad)


class TestCommandLine:
    def test_flags_come_after_the_preset(self, presets):
        assert parse() == Config()
        assert parse("--preset", "small").lisa == Lisa(active_layers=1)
        chosen = parse(
            "--lisa.active-layers", "7", "--preset=small", "--only", "a", "b"
        )
        assert chosen == Config(lisa=Lisa(active_layers=7), only=("a", "b"))
        assert parse("--lisa.adam.learning-rate", "1e-5", "--no-shuffle") == Config(
            lisa=Lisa(active_layers=3, adam=Adam(learning_rate=1e-5)), shuffle=False
        )

    def test_nothing_is_a_word(self, presets):
        (presets / "none.toml").write_text('chunk = "None"\nschedule = "cosine"\n')
        read = parse("--preset", "none", "--schedule", "None")
        assert (read.chunk, read.schedule) == (None, None)
        assert parse("--preset", "none", "--chunk", "8").chunk == 8

    def test_preset_may_be_a_path(self, presets):
        path = presets / "small.toml"
        assert parse("--preset", str(path)).lisa.active_layers == 1

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("smal", "no configs/toy/smal.toml; did you mean 'small'?"),
            ("claims", "no configs/toy/claims.toml; "),
            ("other/small.toml", "--preset other/small.toml: no such file."),
        ],
    )
    def test_missing_preset(self, presets, name, words):
        with pytest.raises(ConfigError) as caught:
            parse("--preset", name)
        assert words in str(caught.value)

    def test_without_tyro_it_says_how_to_get_it(self, presets, monkeypatch):
        monkeypatch.setitem(sys.modules, "tyro", None)
        with pytest.raises(ConfigError, match="Run `uv sync`, or `pip install tyro`"):
            parse()

    def test_unknown_flag_ends_with_the_nearest(self, presets, capsys):
        with pytest.raises(SystemExit) as caught:
            parse("--lisa.active-layer", "2")
        assert caught.value.code == 2
        assert "--lisa.active-layers" in capsys.readouterr().err

    def test_help_shows_fields_and_flags(self, presets, capsys):
        with pytest.raises(SystemExit) as caught:
            cli.parse(Config, "toy", ["--help"], "What it answers.")
        shown = capsys.readouterr().out
        assert caught.value.code == 0
        for words in (
            "What it answers.",
            "--measure-only",
            "Blocks trained at a time.",
        ):
            assert words in shown

    def test_a_field_may_not_hide_a_flag(self, presets):
        bad = dataclasses.make_dataclass("Bad", [("trace", int, 0)], frozen=True)
        with pytest.raises(TypeError, match=r"Bad\.trace is a flag of every"):
            cli.parse(bad, "toy", [])

    def test_resume_takes_the_saved_config_and_refuses_another(self, presets, tmp_path):
        saved = Config(lisa=Lisa(active_layers=5), note="mine")
        (tmp_path / "config.toml").write_text(config.write(saved))
        folder = str(tmp_path)
        assert parse("--resume", folder) == saved
        assert parse("--resume", folder, "--lisa.active-layers", "5") == saved
        with pytest.raises(ConfigError) as caught:
            parse("--resume", folder, "--lisa.active-layers", "4")
        assert str(caught.value).startswith(
            f"--resume {folder}: lisa.active_layers=4 differs from the saved run's 5."
        )
        with pytest.raises(ConfigError, match=r"lisa.active_layers=1 differs"):
            parse("--resume", folder, "--preset", "small")

    def test_a_run_may_go_on_on_another_gpu(self, presets, tmp_path):
        (tmp_path / "config.toml").write_text(config.write(Config(gpu="h200x8")))
        moved = parse("--resume", str(tmp_path), "--gpu", "h200")
        assert moved == Config(gpu="h200")

    def test_what_grows_may_be_more_and_never_less(self, presets, tmp_path):
        @dataclasses.dataclass(frozen=True)
        class Growing:
            steps: int = 4
            why: str = ""

            @property
            def growing(self):
                return {"steps": self.why}

        def resume(steps, why=""):
            (tmp_path / "config.toml").write_text(config.write(Growing(why=why)))
            flags = "--resume", str(tmp_path), "--steps", steps
            return cli.parse(Growing, "toy", flags)[1].steps

        assert resume("6") == 6
        with pytest.raises(ConfigError, match="steps=3 differs from the saved run's 4"):
            resume("3")
        assert resume("4", "Rates fall until then.") == 4
        with pytest.raises(ConfigError, match=r"run's 4\.\nRates fall until then"):
            resume("6", "Rates fall until then.")
        with pytest.raises(ConfigError, match="drop the flag"):
            resume("3", "Rates fall until then.")

    def test_resume_of_nothing(self, presets, tmp_path):
        with pytest.raises(ConfigError, match="no run was saved there"):
            parse("--resume", str(tmp_path / "gone"))
        (tmp_path / "config.toml").write_text("")
        with pytest.raises(ConfigError, match="there is nothing to resume"):
            parse("--resume", str(tmp_path), "--measure-only")
