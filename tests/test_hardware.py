"""The table of GPUs: the shipped one, a user's own, which GPU a name stands for."""

import pytest

from softcot_ds.errors import SoftCoTError
from softcot_ds.planning.hardware import Cluster, load_hardware, peak_flops
from softcot_ds.planning.traffic import Traffic

OWN = """
gpus:
  Mine: {words: Mine, tflops: {bfloat16: 100}, memory_gib: 10, memory_gb_per_s: 1000, link_gb_per_s: 10,
         network_gbps: 80}
reached: {links: 0.5}
"""


@pytest.mark.parametrize(
    ("gpu", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 836),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_peak_is_that_of_the_very_gpu(gpu, tflops):
    assert peak_flops(gpu, "bfloat16") == (tflops and tflops * 1e12)
    assert peak_flops(gpu, "float16") is None, "the table does not say"


def test_memory_is_that_of_the_very_gpu():
    table = load_hardware()
    assert table.found("NVIDIA A100-SXM4-40GB").memory_gib < 40 < table.found("NVIDIA A100-SXM4-80GB").memory_gib


def test_a_file_of_ones_own_adds_and_replaces(tmp_path):
    (tmp_path / "own.yaml").write_text(OWN)
    table = load_hardware(tmp_path / "own.yaml")
    assert table.gpu("mine").flops("bfloat16") == 1e14
    assert table.gpu("h100") == load_hardware().gpu("h100")
    assert table.reached.links == 0.5 != load_hardware().reached.links
    assert table.reached.products == load_hardware().reached.products


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gpus: {mine: {words: Mine}}", r"own.yaml: gpus.mine.tflops: Field required"),
        ("gpu: {}", r"own.yaml: gpu: Extra inputs"),
        ("[1]", r"own.yaml: a hardware table has the mappings gpus and reached"),
        ("reached: {links: 2}", r"reached.links: Input should be less than or equal to 1"),
    ],
)
def test_mistakes_in_it_are_told(tmp_path, text, said):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(SoftCoTError, match=said):
        load_hardware(tmp_path / "own.yaml")


def test_an_unknown_gpu_is_told_the_known_ones():
    with pytest.raises(SoftCoTError, match=r"no GPU 'h1000' in the hardware table; it has b200, .*a10\. .*--hardware"):
        load_hardware().gpu("h1000")


def test_seconds_are_bytes_over_links_and_networks(tmp_path):
    """By hand: 4 nodes with 2 GPUs; links 10 GB/s and networks 80 Gb/s of a GPU, half of which is reached."""
    (tmp_path / "own.yaml").write_text(OWN.replace("links: 0.5", "links: 0.5, hop_us: 0"))
    table = load_hardware(tmp_path / "own.yaml")
    cluster = Cluster(table.gpu("mine"), table.reached, nodes=4, gpus_per_node=2, network_gbps=80)
    assert cluster.groups == [2, 4, 8]
    assert cluster.seconds_of(Traffic(gathered=1e9, gathers=1), 2) == (pytest.approx(0.5 / 5), 0.0)
    # Over all 8: a rank receives 7/8 from the others; a node 3/4, over the networks of its two GPUs.
    assert cluster.seconds_of(Traffic(gathered=1e9, gathers=1), 8) == pytest.approx((0.875 / 5, 0.75 / 10))
    assert cluster.seconds_of(Traffic(summed=1e9, sums=1), 8) == pytest.approx((2 * 0.875 / 5, 2 * 0.75 / 10))
    # In groups of 4 a node's part crosses once.
    assert cluster.seconds_of(Traffic(gathered=1e9, gathers=1), 4) == pytest.approx((0.75 / 5, 0.5 / 10))
