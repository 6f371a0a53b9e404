import subprocess
import sys

import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit.core.seeding import generator, hashed

PARTS = st.lists(st.one_of(st.integers(), st.text()), min_size=1, max_size=4)


def low(*parts):
    """The bits of the seed that torch's CPU generator really uses."""
    return hashed(*parts) & 0xFFFFFFFF


def test_torch_uses_only_the_low_32_bits():
    """The trap that makes hashing necessary: should torch mend it, this says so."""
    a, b = (torch.rand(4, generator=torch.Generator().manual_seed(s)) for s in (7, 7 + 2**32))
    assert torch.equal(a, b)


def test_numbers_that_agree_in_their_low_bits_get_other_seeds():
    assert len({low(0, n, "noise") for n in (7, 7 + 2**32, 7 + 2**33, 7 * 2**32)}) == 4
    assert not torch.equal(*(torch.rand(4, generator=generator(0, n, "noise")) for n in (7, 7 + 2**32)))


def test_effective_seeds_of_a_run_are_as_good_as_distinct():
    """200,000 draws of 32 bits collide about 4.7 times; 30 is far beyond chance."""
    parts = [(seed, n, purpose) for seed in (0, 1) for n in range(50_000) for purpose in ("noise", "t")]
    assert len(parts) - len({low(*p) for p in parts}) < 30


def test_every_part_counts_and_parts_do_not_run_together():
    seeds = [hashed(*p) for p in [(1, 23), (12, 3), (123,), ("1", "2", "3"), (1, 23, ""), ("", 1, 23)]]
    assert len(set(seeds)) == len(seeds)


@given(PARTS)
def test_a_seed_is_what_torch_takes(parts):
    assert 0 <= hashed(*parts) < 2**63
    torch.Generator().manual_seed(hashed(*parts))


def test_recorded_values():
    """A change here changes every run that anybody resumes."""
    assert hashed(0, 0, "noise") == 47389624185098140
    assert hashed("café", -1) == 6104803033824770463


def test_another_process_hashes_the_same():
    code = "from lorakit.core.seeding import hashed; print(hashed(3, 'x'))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(told) == hashed(3, "x")  # Python's own hash of a text differs from process to process


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    torch.rand(5, generator=generator(1, "noise"))
    assert torch.equal(before, torch.get_rng_state())


def test_a_file_name_that_is_no_utf8_can_be_hashed():
    assert hashed("\udcff") != hashed("\udcfe")
