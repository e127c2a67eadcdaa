"""The table of devices, what is written for them on a command line, and how long one takes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.errors import UserError
from distill.hardware import MOST, Device, Pool, calibration_file, load_devices, named_like, parse_pool
from distill.roofline import EXPERTS_SHARE, Demand, times

NAMES = ["A100-40", "A100-80", "H100", "H200", "B200", "L40S", "RTX4090", "CPU"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders of the user's own, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path


def test_the_table_has_what_plans_are_made_for() -> None:
    devices = load_devices()
    assert list(devices) == NAMES
    assert all(len(device.source) > 20 for device in devices.values())
    h100, h200, a100 = devices["H100"], devices["H200"], devices["A100-80"]
    # Dense figures: the datasheets' 1,979 and 3,958 are with sparsity.
    assert (h100.peak("bf16"), h100.peak("fp8")) == (989e12, 1979e12)
    assert (h200.memory, h200.bandwidth, h200.peak("bf16")) == (141, 4800, 989e12)
    assert a100.peak("fp8") == a100.peak("bf16") == 312e12  # no fp8 units


@pytest.mark.parametrize(
    ("text", "name", "count", "per_node", "shown"),
    [
        ("8xH200", "H200", 8, 8, "8xH200"),
        ("h200", "H200", 1, 8, "1xH200"),
        (" 2x8xH100 ", "H100", 16, 8, "2x8xH100"),
        ("16 x H100", "H100", 16, 8, "2x8xH100"),
        ("12xH100", "H100", 12, 8, "12xH100"),
        ("2X4Xrtx 4090", "RTX4090", 8, 4, "2x4xRTX4090"),
        ("4*NVIDIA-L40S", "L40S", 4, 8, "4xL40S"),
        ("8xA100_80", "A100-80", 8, 8, "8xA100-80"),
    ],
)
def test_pools_are_written_in_many_ways(text: str, name: str, count: int, per_node: int, shown: str) -> None:
    pool = parse_pool(text, load_devices())
    assert (pool.name, pool.count, pool.per_node, str(pool)) == (name, count, per_node, shown)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("8xA100", "nearest: A100-40, A100-80"),
        ("8xH20", "nearest: H200"),
        ("8xL40", "nearest: L40S"),
        ("8xH800", "nearest: H200, H100"),
        ("0xH100", "is 0 devices; a plan is made for 1 to 100000"),
        ("99999x8xH100", "is 799992 devices"),
        ("", "names no device; write COUNTxNAME"),
        ("8x", "no device is called '8x'"),
        ("-1xH100", "no device is called '-1xH100'"),
        ("1x2x3xH100", "no device is called '3xH100'"),
    ],
)
def test_what_names_no_pool_is_said_in_a_sentence(text: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        parse_pool(text, load_devices(), option="--gpus-teacher")
    assert said in str(error.value) and "--gpus-teacher" in str(error.value)


def specs() -> st.SearchStrategy[str]:
    """Anything, and what is nearly right."""
    number = st.one_of(st.integers(-5, 10**12).map(str), st.sampled_from(["", "\u0663", "1e3", "0x10", " 8 "]))
    name = st.one_of(st.sampled_from([*NAMES, "A100", "gpu", "rtx 4090"]), st.text(max_size=8))
    cross = st.sampled_from(["x", "X", "*", " x ", "", "\u00d7"])
    return st.one_of(st.text(max_size=30), st.tuples(number, cross, number, cross, name).map("".join))


DEVICES = load_devices()


@given(text=specs())
def test_any_text_is_a_pool_or_a_sentence(text: str) -> None:
    try:
        pool = parse_pool(text, DEVICES)
    except UserError as error:
        assert "--gpus" in str(error) and len(str(error)) < 600
    else:
        assert 1 <= pool.count <= MOST and pool.per_node >= 1
        # What a plan prints means the same pool.
        again = parse_pool(str(pool), DEVICES)
        assert (again.name, again.count) == (pool.name, pool.count)


def test_a_file_of_ones_own_adds_and_changes(home: Path) -> None:
    (home / "config/strong-to-weak").mkdir(parents=True)
    (home / "config/strong-to-weak/hardware.yaml").write_text("H100:\n  usd_per_hour: 2.5\n  memory: 94\n")
    extra = home / "mine.yaml"
    extra.write_text(
        "MI300X:\n  memory: 192\n  bandwidth: 5300\n  tflops: {fp32: 163.4, bf16: 1307, fp8: 2615}\n"
        "  link: 448\n  network: 50\n  source: datasheet\nH100: {memory: 96}\n"
    )
    assert (load_devices()["H100"].memory, load_devices()["H100"].usd_per_hour) == (94, 2.5)
    devices = load_devices(extra)
    assert (devices["H100"].memory, devices["H100"].usd_per_hour, devices["H100"].bandwidth) == (96, 2.5, 3350)
    assert parse_pool("8xmi300x", devices).device.peak("fp8") == 2615e12


def test_what_was_measured_wins_over_the_table(home: Path) -> None:
    calibration_file().parent.mkdir(parents=True)
    calibration_file().write_text(
        "CPU: {bandwidth: 11.5, measured: today}\nH200: {kind: gpu, bandwidth: 4100, measured: today}\n"
    )
    device = load_devices()["CPU"]
    assert (device.bandwidth, device.measured, device.link) == (11.5, "today", 10)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("H100: {memory: -3}", "the device H100 of the hardware table is not valid: memory"),
        ("H100: {memmory: 3}", "unknown key memmory (did you mean memory?"),
        ("MINE: {memory: 3}", "bandwidth: Field required"),
        ("- H100", "is not devices with figures below them"),
        ("H100: 80", "is not devices with figures below them"),
        ("H100: [", "is not valid YAML"),
    ],
)
def test_a_wrong_file_is_said_in_a_sentence(home: Path, text: str, said: str) -> None:
    path = home / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_devices(path)
    assert said in str(error.value)


def test_a_file_that_is_not_there_is_said(home: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_devices(home / "none.yaml")


def test_a_driver_s_name_finds_its_device() -> None:
    devices = load_devices()
    assert named_like("NVIDIA H100 80GB HBM3", 85.0, devices) == "H100"
    assert named_like("NVIDIA A100-SXM4-40GB", 42.4, devices) == "A100-40"
    assert named_like("NVIDIA A100 80GB PCIe", 85.1, devices) == "A100-80"
    assert named_like("NVIDIA GeForce RTX 4090", 25.3, devices) == "RTX4090"
    assert named_like("Tesla T4", 15.8, devices) == "Tesla T4"


def device(**change: object) -> Device:
    """1 TFLOP/s, 100 GB/s, all of it reached, 10 us a pass."""
    tree = {
        "memory": 10,
        "bandwidth": 100,
        "tflops": {"fp32": 0.5, "bf16": 1},
        "link": 50,
        "network": 5,
        "source": "made up",
        "bandwidth_share": 1,
        "shares": {"train": 0.5, "score": 1, "sample": 1, "serve": 1},
        "latency": {"train": 10, "score": 10, "sample": 10, "serve": 10},
    }
    return Device.model_validate({**tree, **change})


def test_a_device_takes_as_long_as_its_slowest_part() -> None:
    demand = Demand(flops=1e12, memory=5e10, wire=2e10, passes=1000)
    found = times(demand, device(), "train", "bf16", wire_rate=50e9)
    # 1e12 / (1e12 * 0.5), 5e10 / 1e11, 2e10 / 5e10, 1000 * 1e-5
    assert [found.compute, found.memory, found.wire, found.latency] == pytest.approx([2.0, 0.5, 0.4, 0.01])
    assert found.seconds == pytest.approx(2.01) and found.bottleneck == "compute"
    assert times(demand, device(), "score", "fp32", wire_rate=50e9).compute == pytest.approx(2.0)
    assert times(demand, device(), "train", "bf16", experts=True).compute == pytest.approx(2.0 / EXPERTS_SHARE)


@pytest.mark.parametrize(
    ("demand", "name"),
    [
        (Demand(flops=1e12), "compute"),
        (Demand(flops=1e9, memory=1e11), "memory bandwidth"),
        (Demand(memory=1e9, wire=1e11), "wire"),
        (Demand(flops=1e9, passes=1e6), "latency"),
    ],
)
def test_the_bottleneck_is_named(demand: Demand, name: str) -> None:
    assert times(demand, device(), "score", "bf16", wire_rate=50e9).bottleneck == name


def test_a_pool_counts_its_machines() -> None:
    assert str(Pool("H100", device(), 128, 8)) == "16x8xH100"
    assert Pool("H100", device(), 8, 8).bytes == 10**10 and not math.isnan(device().peak("fp8"))
