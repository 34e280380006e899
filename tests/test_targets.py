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
    servers = "h200 h100 gh200 a100-80 a100-40 b200 b300 l40s l4 a10 t4"
    desks = "rtxpro6000 rtx6000ada a6000 rtx5090 rtx5080 rtx4090 rtx4080 rtx4070tisuper"
    assert set(TARGETS) == {*servers.split(), *desks.split(), "rtx3090", "rtx3060"}


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("RTX 5090", "rtx5090"),
        ("5080", "rtx5080"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "rtx4070tisuper"),
        ("rtx-4070-ti-super", "rtx4070tisuper"),
        ("3060 12 GB", "rtx3060"),
        ("RTX PRO 6000", "rtxpro6000"),
        ("RTX 6000 Ada", "rtx6000ada"),
        ("a100-80GB", "a100-80"),
    ],
)
def test_a_card_is_found_as_it_is_written_on_its_box(written, name):
    assert resolve(written) is TARGETS[name]
    assert resolve(f"{written} x2").devices == 2


def test_cards_of_one_chip_differ_in_memory_as_they_are_sold():
    """What an allocator can get of each, against the size that is on the box."""
    sold = {"rtx5090": 32, "rtx5080": 16, "rtx4080": 16, "rtx4070tisuper": 16}
    sold |= {"rtx3060": 12, "t4": 16, "l40s": 48, "a10": 24, "rtx6000ada": 48}
    sold |= {"rtxpro6000": 96, "gh200": 96, "b300": 288}
    for name, gib in sold.items():
        assert 0.90 * gib < TARGETS[name].compiler_bytes / GiB <= gib, name


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

    def test_three_lines_are_a_card(self, tmp_path):
        path = tmp_path / "mine.toml"
        path.write_text('like = "rtx4090"\nmemory_gib = 32\ncores = 144\n')
        mine, like = resolve(str(path)), resolve("rtx4090")
        assert (mine.name, mine.description) == ("mine", "mine")
        assert (mine.compiler_bytes, mine.usable_bytes) == (32 * GiB, 30 * GiB)
        assert mine.cores == 144
        same = {"name": "", "description": "", "cores": 1, "usable_bytes": GiB}
        same |= {"compiler_bytes": 2 * GiB}
        same["name"] = same["description"] = "same"
        assert dataclasses.replace(mine, **same) == dataclasses.replace(like, **same)

    @pytest.mark.parametrize(
        ("lines", "words"),
        [
            ('like = "rtx4091"', r":1: like='rtx4091' is no card.*mean 'rtx4090'"),
            ("like = 4090", r":1: like=4090 is refused; need a string"),
            ('like = "l4"\nmemory_gb = 3', r":2: unknown .*mean 'memory_gib'"),
            ('like = "l4"\nmemory_gib = nan', r":2: memory_gib=nan is refused; need 1"),
            ('like = "l4"\nmemory_gib = 0', r":2: memory_gib=0 is refused; need 1 to"),
            (
                'like = "l4"\nmemory_gib = "8"',
                r":2: memory_gib='8' is refused; need a n",
            ),
            (
                'like = "l4"\ncompiler_bytes = 9e9\nmemory_gib = 8',
                r":3: memory_gib and compiler_bytes say the same",
            ),
            ("memory_gib = 32", r"missing field 'compute_capability'.*like = \"rtx"),
            (f"cores = {'[' * 10_000}", r"not a readable TOML file"),
            (f"cores = {'9' * 5000}", r"not a readable TOML file"),
        ],
    )
    def test_what_is_no_short_card(self, tmp_path, lines, words):
        (tmp_path / "mine.toml").write_text(lines)
        with pytest.raises(ValueError, match=rf"mine\.toml.*{words}"):
            resolve(str(tmp_path / "mine.toml"))

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

    path, half = tmp_path / "mycard.toml", count(200) // 2
    short = b'like = "rtx4090"\nmemory_gib = 32\ncores = 144\n'
    for text in (CARD.encode(), short):
        found = outcomes(toml_mutants(text, half, 7), path, card_of, ValueError)
        assert sum(found.values()) == half
        assert min(found.values()) > 0, found
