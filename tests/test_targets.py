"""Names, meshes and the user's own card; every refusal names field, value and rule."""

import dataclasses

import pytest
from mutations import count, outcomes, toml_mutants

from jmem.targets import TARGETS, GiB, Target, resolve

CARD = """\
description = "NVIDIA RTX 4000"
compute_capability = "8.9"
cores = 48
fpus_per_core = 128
compiler_bytes = 21e9
bandwidth = 3.6e11
l2_bytes = 50331648
clock_ghz = 2
shared_bytes_per_core = 102400
shared_bytes_per_block = 101376
threads_per_core = 1536
"""


@pytest.fixture
def card(tmp_path):
    """Writes a card's file with some lines changed, and returns its path."""

    def write(**changes):
        lines = [*map(str, CARD.splitlines())]
        for field, value in changes.items():
            kept = [n for n, line in enumerate(lines) if line.startswith(f"{field} ")]
            at = kept[0] if kept else len(lines)
            lines[at : at + 1] = [f"{field} = {value}"]
        path = tmp_path / "mycard.toml"
        path.write_text("\n".join(lines))
        return str(path)

    return write


def test_every_published_card_is_there():
    wanted = {"h200", "h100", "a100-80", "a100-40", "b200", "l4"}
    assert set(TARGETS) == wanted | {"rtx4090", "rtx3090", "a6000"}


@pytest.mark.parametrize("name", TARGETS)
def test_a_card_resolves_by_its_name_however_it_is_written(name):
    target = TARGETS[name]
    assert resolve(name) is target
    assert resolve(name.upper()) is target
    assert resolve(f" {name} ") is target
    assert resolve(target) is target


@pytest.mark.parametrize("name", TARGETS)
def test_usable_bytes_leave_the_driver_its_share(name):
    target = TARGETS[name]
    assert target.usable_bytes == target.compiler_bytes - 2 * GiB


def test_the_h200_has_139_gib():
    assert resolve("h200").usable_bytes == 139 * GiB


@pytest.mark.parametrize(
    ("name", "devices", "topology"),
    [
        ("h200", 1, "1x1x1"),
        ("h200x8", 8, "1x1x8"),
        ("rtx4090x2", 2, "1x1x2"),
        ("A100-80 x16", 16, "1x2x8"),
    ],
)
def test_a_mesh_is_a_name_and_a_number(name, devices, topology):
    target = resolve(name)
    assert (target.devices, target.topology) == (devices, topology)


@pytest.mark.parametrize("devices", [0, 9, 4104])
def test_a_mesh_of_an_odd_size_is_refused(devices):
    with pytest.raises(ValueError, match=rf"devices={devices} is refused; need 1 to 8"):
        resolve(f"h200x{devices}")


@pytest.mark.parametrize(("typo", "near"), [("h20", "h200"), ("rtx4091", "rtx4090")])
def test_a_typo_gets_the_nearest_name(typo, near):
    with pytest.raises(ValueError, match=f"'{typo}'.*did you mean '{near}'"):
        resolve(typo)


def test_what_is_no_name_is_a_type_error():
    with pytest.raises(TypeError, match="target"):
        resolve(8)  # pyright: ignore[reportArgumentType]


def test_capability_compares_by_number():
    assert resolve("b200").capability > resolve("h200").capability >= (9, 0)


@pytest.mark.compat
@pytest.mark.parametrize("name", ["h200x8", "rtx3090"])
def test_xla_takes_the_description(name):
    target = resolve(name)
    devices = target.compile_only_devices()
    assert len(devices) == target.devices
    assert {device.device_kind for device in devices} == {target.description}


class TestOwnCard:
    def test_a_file_is_a_target(self, card):
        target = resolve(card(usable_bytes=20_000_000_000, devices=2))
        assert target.name == "mycard"
        assert target.compiler_bytes == 21_000_000_000
        assert target.usable_bytes == 20_000_000_000
        assert target.devices == 2
        assert target.compile_only_devices()[0].device_kind == "NVIDIA RTX 4000"

    def test_name_and_description_default_to_the_file(self, card, tmp_path):
        path = card()
        text = (tmp_path / "mycard.toml").read_text()
        (tmp_path / "mycard.toml").write_text(text.split("\n", 1)[1])
        assert resolve(path).description == "mycard"

    def test_an_unknown_field_gets_line_and_nearest_name(self, card):
        with pytest.raises(
            ValueError, match=r"mycard\.toml:12: unknown field 'core'; .*'cores'"
        ):
            resolve(card(core=12))

    @pytest.mark.parametrize(
        ("field", "value", "rule"),
        [
            ("compiler_bytes", "24", r"=24 is refused; need 1,073,741,824 to"),
            ("compiler_bytes", "'24 GB'", r"='24 GB' is refused; need a whole number"),
            ("compiler_bytes", "1.5", r"=1.5 is refused; need a whole number"),
            ("compiler_bytes", "inf", r"=inf is refused; need a whole number"),
            ("cores", "true", r"=True is refused; need a whole number"),
            ("cores", "0", r"=0 is refused; need 1 to 1,024"),
            ("clock_ghz", "2520", r"=2520 is refused; need 0.1 to 10 GHz"),
            ("clock_ghz", "nan", r"=nan is refused; need 0.1 to 10 GHz"),
            ("compute_capability", "8.9", r"=8.9 is refused; need a string"),
            ("compute_capability", "'sm_89'", r"='sm_89' is refused; need a string"),
            ("compute_capability", "'6.0'", r"='6.0' is refused; need a string"),
            ("usable_bytes", "22000000000", r"at most compiler_bytes"),
            ("description", "'a\"b'", r"characters that need no escape"),
            ("shared_bytes_per_block", "204800", r"48 KiB to shared_bytes_per_core"),
        ],
    )
    def test_an_absurd_value_is_refused_with_field_value_rule_and_line(
        self, card, field, value, rule
    ):
        path = card(**{field: value})
        with pytest.raises(ValueError, match=rf"mycard\.toml:\d+: {field}.*{rule}"):
            resolve(path)

    def test_the_line_is_the_field_s_own(self, card):
        with pytest.raises(ValueError, match=r"mycard\.toml:8: clock_ghz=2520"):
            resolve(card(clock_ghz=2520))

    def test_a_missing_field_is_named(self, tmp_path):
        path = tmp_path / "small.toml"
        path.write_text("cores = 4\n")
        with pytest.raises(ValueError, match="missing field 'compute_capability'"):
            resolve(str(path))

    @pytest.mark.parametrize("content", [b"cores = = 4", b"\xff\xfe", None])
    def test_an_unreadable_file_is_named(self, tmp_path, content):
        path = tmp_path / "broken.toml"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=r"broken\.toml: not a readable TOML"):
            resolve(str(path))


def test_a_target_is_checked_when_it_is_made():
    with pytest.raises(ValueError, match=r"cores=0 is refused"):
        dataclasses.replace(resolve("h200"), cores=0)
    assert isinstance(resolve("h200"), Target)


def test_mutated_files_are_a_card_or_refused_by_name(tmp_path):
    def card_of(path):
        assert resolve(str(path)).compiler_bytes > 0

    path, mutants = tmp_path / "mycard.toml", toml_mutants(CARD.encode(), count(200), 7)
    found = outcomes(mutants, path, card_of, ValueError)
    assert sum(found.values()) == count(200)
    assert min(found.values()) > 0, found
